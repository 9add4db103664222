"""Stream text like `generate`, and record every routing decision into a .moetrace file."""

from __future__ import annotations

import argparse

from moescope.commands import generate, options, running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)
    parser.add_argument(
        "--shadow",
        action="append",
        default=[],
        metavar="NAME",
        help="also record what this variant would have picked on the same logits; repeatable",
    )
    options.add_recording(parser, required=True)


def run(args: argparse.Namespace) -> int:
    with running.signals():
        return generate.stream(args)
