"""Compare a model's routing with a golden trace, for CI: exit code 0 if it agrees, 1 if not.

The model is fed the golden's tokens. A flip of experts counts only where the golden margin is at
least ε (a share of the score at the cut): closer decisions turn with the kernel and the dtype.
`moescope trace MODEL --golden -o FILE` makes a golden.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.commands import options, reading, running
from moescope.commands.balance import lane_of
from moescope.errors import ExitCode, MoescopeError

if TYPE_CHECKING:
    from moescope.diagnosis.check import CheckResult

EXAMPLES = 12  # rows that are listed
# option, field of the tolerance, what it says
TOLERANCES = (
    ("--margin", "margin", "ε: closer decisions may flip"),
    ("--max-sum-err", "score_sum", "how far Σ may be off, as a share of it"),
    ("--max-weight-err", "weight", "how far a weight may be off, as a share of Σ"),
    ("--min-agree", "agree", "share of each layer's rows that must agree"),
    ("--min-order-agree", "order", "share of rows with the same experts that must rank them alike"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--against", required=True, metavar="GOLDEN", type=Path)
    parser.add_argument("--lane", metavar="A", help="of the golden; default: the first")
    parser.add_argument(
        "--variant", default="trained", metavar="NAME", help="run the model under this variant"
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="feed everything as prompts: faster, and other kernels than decoding",
    )
    group = parser.add_argument_group("tolerances; defaults depend on the coarser dtype")
    for option, name, text in TOLERANCES:
        group.add_argument(option, dest=name, type=options.ratio, metavar="X", help=text)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML here")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.diagnosis import check as checking

    if args.junit is not None:
        _check_junit(args.junit)
    lane = None if args.lane is None else lane_of(args.lane)
    with reading.opened(args.against) as golden, running.signals():
        _, model, _ = running.load(args)
        began = time.monotonic()
        dtype = str(golden.meta.engine.get("dtype", "float32"))
        tolerance = checking.with_overrides(
            checking.tolerance_for(model.interpreter.dtype, dtype),
            **{name: getattr(args, name) for _, name, _ in TOLERANCES},
        )
        result = checking.check(
            model,
            golden,
            tolerance=tolerance,
            variant=args.variant,
            lane=lane,
            decode=not args.prefill,
        )
        seconds = time.monotonic() - began
    name = str(model.facts["name"])
    if args.junit is not None:
        _write_junit(args.junit, result, name, args.against.name, seconds)
    if args.json:
        document = {"model": name, "golden": args.against.name, "seconds": round(seconds, 3)}
        options.print_json({**document, **result.to_json()})
    else:
        print("\n".join(_lines(result, name, args.against.name)))
    return int(ExitCode.DONE if result.passed else ExitCode.FOUND)


def _check_junit(path: Path) -> None:
    """Only XML is written over: a slip of the hand must not cost a trace."""
    try:
        start = path.open("rb").read(5) if path.exists() else b""
    except OSError as error:
        raise MoescopeError(f"{path.name}: {error.strerror}", code=ExitCode.OUTPUT) from None
    if start and start != b"<?xml":
        raise MoescopeError(
            f"{path.name}: already exists and is no XML", hint="another name", code=ExitCode.OUTPUT
        )
    if not path.parent.is_dir():
        raise MoescopeError(f"{path}: the folder does not exist", code=ExitCode.OUTPUT)


def _write_junit(path: Path, result: CheckResult, model: str, golden: str, seconds: float) -> None:
    from moescope.diagnosis.check_junit import junit
    from moescope.trace.formats import written_whole

    with written_whole(path) as temporary:
        temporary.write_bytes(junit(result, model, golden, seconds))


def _lines(result: CheckResult, model: str, golden: str) -> list[str]:
    from moescope.diagnosis.check import uncompared
    from moescope.diagnosis.check_junit import TITLES, line_of

    verdict = "agrees with" if result.passed else "differs from"
    rows = sum(router.rows for router in result.routers)
    near = sum(router.near_ties for router in result.routers)
    flips = sum(router.flips for router in result.routers)
    epsilon = f"ε {result.tolerance.margin:g}"
    lines = [
        options.plain(f"{model} ({result.dtype}) {verdict} {golden} ({result.golden_dtype})"),
        f"   {result.tokens} tokens in {result.sequences} sequences, {rows} decisions, "
        f"{near} of them near ties ({epsilon}), {flips} flipped",
    ]
    lines += [f"   {name}: another one than the golden's" for name in _others(result)]
    for kind, title in TITLES.items():
        shown = uncompared(result, kind) or f"{result.agreement[kind]:.2%}"
        bad = [f"L{router.layer:02d}" for router in result.routers if not router.passed[kind]]
        where = "" if not bad else "   fails in " + _some(bad)
        lines.append(f"   {title:<22} {shown:>12}{where}")
    lines += [f"      {options.plain(line_of(row))}" for row in result.findings[:EXAMPLES]]
    return lines


def _others(result: CheckResult) -> list[str]:
    return [name for name, same in result.same.items() if same is False]


def _some(names: list[str], most: int = 8) -> str:
    return " ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
