"""Look for what can be wrong with a trace although every value in it is legal: lost rank order, ids
cut to 8 bits, swapped axes, layers that were not captured, sums no such router gives. Exit code 1
if any finding is an error. Any format that `moescope convert` reads."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.commands import options, reading
from moescope.commands.convert import FORMATS
from moescope.errors import ExitCode

if TYPE_CHECKING:
    from moescope.trace.lint import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", type=Path)
    parser.add_argument("--from", dest="from_", choices=FORMATS, help="where two formats fit")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.trace.lint import ERROR, lint, to_json

    with reading.opened(args.trace, args.from_) as trace:
        found = lint(trace)
    wrong = any(finding.severity == ERROR for finding in found)
    if args.json:
        options.print_json({"trace": args.trace.name, "ok": not wrong, "findings": to_json(found)})
    else:
        print("\n".join(_lines(args.trace.name, found)))
    return int(ExitCode.FOUND if wrong else ExitCode.DONE)


def _lines(name: str, found: Sequence[Finding]) -> list[str]:
    if not found:
        return [options.plain(f"{name}: nothing found")]
    counts = {kind: sum(f.severity == kind for f in found) for kind in ("error", "warning", "note")}
    shown = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n)
    lines = [options.plain(f"{name}: {shown}")]
    for finding in found:
        place = f"sequence {finding.sequence} lane {'ABCDEFGH'[finding.lane % 8]}"
        where = f" ({', '.join(finding.where)}{' …' * (finding.rows > len(finding.where))})"
        rows = f"{finding.rows} of {finding.of} rows" if finding.of > 1 else ""
        head = f"{finding.severity} {finding.rule}: {finding.seen}"
        lines.append(options.plain(f"{head}; {place} {rows}{where if finding.where else ''}"))
        lines += textwrap.indent(
            options.plain(f"{finding.means}\nTry: {finding.advice}"), "   "
        ).splitlines()
    return lines
