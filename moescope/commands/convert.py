"""Turn a trace into another format: .moetrace, .parquet, .csv or .jsonl (the long form, one row per
token, lane and router), in either direction. The source is recognised by its content."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moescope.commands import options

FORMATS = ("moetrace", "parquet", "csv", "jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--from", dest="from_", choices=FORMATS, help="where two formats fit")
    parser.add_argument("--to", choices=FORMATS, help="where OUT's name does not say")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.trace.formats import convert

    summary = convert(args.source, args.target, from_=args.from_, to=args.to, force=args.force)
    if args.json:
        options.print_json(summary)
    else:
        facts = ", ".join(f"{name} {value}" for name, value in summary.items())
        print(f"{args.target.name}: {facts}", file=sys.stderr)
    return 0
