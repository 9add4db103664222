"""Compare two traces of the same text: tokens, experts, their order, weights. Exit code 1 where
they differ. Any format that `moescope convert` reads."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.commands import compared, options, reading
from moescope.commands.balance import lane_of
from moescope.errors import ExitCode

if TYPE_CHECKING:
    from moescope.diagnosis.diff import LaneDiff, TraceDiff


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument(
        "--lanes",
        nargs=2,
        metavar=("LANE", "LANE"),
        help="a lane of each, e.g. A B; default: those both have",
    )
    parser.add_argument(
        "--tolerance",
        type=options.ratio,
        default=1e-5,
        metavar="X",
        help="how far weights may be apart (default 1e-5)",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.diagnosis.diff import diff

    lanes = None if args.lanes is None else (lane_of(args.lanes[0]), lane_of(args.lanes[1]))
    with reading.opened(args.a) as a, reading.opened(args.b) as b:
        found = diff(a, b, lanes=lanes, tolerance=args.tolerance)
        problems = {
            key: list(trace.problems) for key, trace in (("a", a), ("b", b)) if trace.problems
        }
    if args.json:
        notes = {"problems": problems} if problems else {}
        options.print_json({"a": args.a.name, "b": args.b.name, **found.to_json(), **notes})
    else:
        print("\n".join(_lines(found, args.a.name, args.b.name)))
    return int(ExitCode.DONE if found.same else ExitCode.FOUND)


def _lines(found: TraceDiff, a: str, b: str) -> list[str]:
    verdict = "the same routing" if found.same else "different routing"
    lines = [options.plain(f"{a} and {b}: {verdict}")]
    for name, (left, right) in found.conditions.items():
        lines.append(
            f"   {name:<24} {options.plain(_short(left))}  →  {options.plain(_short(right))}"
        )
    for title, places in (
        (f"routers only in {a}", found.routers_only_in_a),
        (f"routers only in {b}", found.routers_only_in_b),
    ):
        if places:
            shown = " ".join(
                f"L{layer}" + "a" * (site == "attention") for layer, site in places[:12]
            )
            lines.append(options.plain(f"   {title}: {shown}"))
    for title, lanes in (
        (f"only in {a}", found.lanes_only_in_a),
        (f"only in {b}", found.lanes_only_in_b),
    ):
        if lanes:
            shown = ", ".join(f"sequence {s} lane {compared.letter(lane)}" for s, lane in lanes[:8])
            lines.append(options.plain(f"   {title}: {shown}"))
    for lane in found.lanes:
        lines += _lane(lane)
    return lines


def _lane(lane: LaneDiff) -> list[str]:
    letters = " and ".join(dict.fromkeys(map(compared.letter, lane.lanes)))
    title = f"sequence {lane.sequence}, lane {letters}"
    if lane.same:
        apart = f", weights within {lane.weights_apart:.1g}" if lane.weights_apart > 0 else ""
        return [f"   {title}: {lane.comparison.tokens} tokens alike{apart}"]
    alone = [
        f"{n} only in {name}" for n, name in ((lane.only_in_a, "A"), (lane.only_in_b, "B")) if n
    ]
    more = f" ({', '.join(alone)})" if alone else ""
    rows = [f"\n{title}: {lane.comparison.tokens} tokens in both{more}"]
    if lane.unordered:
        rows.append(f"   {'same experts in another order':<34} {lane.unordered} decisions")
    if not math.isnan(lane.weights_apart):
        rows.append(f"   {'largest |Δ weight|, same experts':<34} {lane.weights_apart:.3g}")
    return rows + compared.comparison_lines(lane.comparison)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
