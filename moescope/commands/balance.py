"""Say how evenly a trace uses its experts: load and its measures, auxiliary losses in both
normalisations, pairs of experts, prefill against decode, and what chance alone would show.

One lane is counted, over all its sequences. Losses need router logits (`--record logits`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.commands import options, reading
from moescope.commands.convert import FORMATS
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.diagnosis.balance_report import Balance, RouterBalance

LETTERS = "ABCDEFGH"
# heading, width, measure, digits
COLUMNS = (
    ("CV", 7, "cv", 3),
    ("max/mean", 9, "max_over_mean", 2),
    ("MaxVio", 7, "max_violation", 2),
    ("Gini", 6, "gini", 3),
    ("Jain", 6, "jain", 3),
    ("exp(H)/E", 9, "effective_experts", 3),
    ("dead", 5, "dead", 0),
    ("cold", 5, "cold", 0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", type=Path)
    parser.add_argument("--from", dest="from_", choices=FORMATS, help="where two formats fit")
    parser.add_argument("--lane", metavar="A", help="of a comparison; default: the first")
    parser.add_argument(
        "--padding",
        type=options.natural,
        action="append",
        default=[],
        metavar="ID",
        help="a token id that counts nowhere; repeatable",
    )
    parser.add_argument(
        "--pairs",
        type=options.natural,
        default=4,
        metavar="N",
        help="pairs of experts to list a layer; 0: all there are",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.diagnosis.balance_report import balance_of

    lane = None if args.lane is None else lane_of(args.lane)
    with reading.opened(args.trace, args.from_) as trace:
        found = balance_of(trace, lane, padding=args.padding, pairs=args.pairs)
        problems = list(trace.problems)
    if args.json:
        notes = {"problems": problems} if problems else {}
        options.print_json({"trace": args.trace.name, **found.to_json(), **notes})
    else:
        lost = any(problem.startswith("event ") for problem in problems)
        unknown = "variant cannot be read" if lost else "variant not recorded"
        print("\n".join(_lines(args.trace.name, found, unknown)))
    return 0


def lane_of(text: str) -> int:
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    if text.isascii() and text.isdigit() and len(text) < 6:
        return int(text)
    raise MoescopeError(f"--lane: expected a letter A to H, found {text[:20]!r}")


def _lines(name: str, found: Balance, unknown: str) -> list[str]:
    variant = ", ".join(found.variants) or unknown
    tokens = f"{found.tokens} tokens ({found.prefill} of prompts, {found.decode} decoded)"
    left = f", {found.padding} of padding left out" if found.padding else ""
    lane = LETTERS[found.lane] if found.lane < len(LETTERS) else str(found.lane)
    lines = [options.plain(f"{name}  lane {lane}  {variant}  {tokens}{left}"), ""]
    lines += _table(found.routers)
    lines += ["", *_losses(found), *_phases(found.routers), *_pairs(found)]
    return lines


def _table(routers: Sequence[RouterBalance]) -> list[str]:
    from moescope.diagnosis.balance_report import BALANCED

    head = "layer" + "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS)
    rows = [f"{head}   chance CV  tokens"]
    for router in routers:
        chance = router.chance
        cells = [_number(router.measures[name], digits) for _, _, name, digits in COLUMNS]
        label = f"{router.layer}{'a' if router.site == 'attention' else ''}"
        needed = "-" if chance.tokens_needed is None else str(chance.tokens_needed)
        mark = "" if router.measures["cv"] > chance.cv_bound else " ≈"
        rows.append(f"{_cells(label, cells)}   {_number(chance.cv_bound, 3):>9}{needed:>8}{mark}")
    rows.append(_cells("even", [_number(BALANCED[name], 0) for _, _, name, _ in COLUMNS]))
    rows.append("chance CV: an even router stays below it in 95 % of cases, after as many tokens;")
    rows.append("tokens: from how many on such a CV is more than chance (more, as texts repeat)")
    if any(not r.measures["cv"] > r.chance.cv_bound for r in routers):
        rows.append("≈ no more uneven than chance")
    return rows


def _cells(label: str, cells: Sequence[str]) -> str:
    widths = [width for _, width, _, _ in COLUMNS]
    return f"{label:>5}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


def _losses(found: Balance) -> list[str]:
    loss = found.auxiliary
    if loss is None:
        return ["auxiliary losses: not recorded (they need --record logits)"]
    lines = [f"auxiliary loss over {loss.tokens} tokens"]
    for title, value, even in (
        ("pooled over layers (transformers)", loss.pooled, loss.pooled_balanced),
        ("each layer by itself (Switch, DeepSeek), mean", loss.layers_mean, loss.layers_balanced),
        ("the same by sequence, mean", loss.sequences_mean, 1.0),
    ):
        share = "" if not even > 0 else f", {100 * (value / even - 1):+.1f} %"
        if math.isnan(value):
            lines.append(f"   {title:<46} layers differ in experts or top-k")
        else:
            lines.append(f"   {title:<46} {_number(value, 3):>7}   even: {even:g}{share}")
    lines.append(f"   {'z-loss':<46} {_number(loss.z_loss, 2):>7}")
    return lines


def _phases(routers: Sequence[RouterBalance]) -> list[str]:
    known = [r for r in routers if not math.isnan(r.prefill_decode)]
    if not known:
        return []
    mean = sum(r.prefill_decode for r in known) / len(known)
    chance = sum(r.prefill_decode_chance for r in known) / len(known)
    what = f"{mean:.3f} of the picks would have to move; by chance alone {chance:.3f}"
    return [f"prefill against decode: {what}"]


def _pairs(found: Balance) -> list[str]:
    if not found.paired:
        return ["pairs: not counted (too many experts)"]
    lines = ["pairs picked together most often (tokens, lift):"]
    for router in found.routers:
        if not router.pairs:
            continue
        shown = "  ".join(f"E{p.a}+E{p.b} {p.tokens} ×{p.lift:.1f}" for p in router.pairs)
        lines.append(f"   L{router.layer}  {shown}")
    return lines if len(lines) > 1 else []


def _number(value: Any, digits: int) -> str:
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"
