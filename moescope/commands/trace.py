"""Stream text like `generate`, and record every routing decision into a .moetrace file."""

from __future__ import annotations

import argparse

from moescope.commands import generate, running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)
    group = parser.add_argument_group("recording")
    group.add_argument("-o", "--output", metavar="FILE", required=True)
    group.add_argument(
        "--record",
        default="weights",
        choices=("ids", "weights", "logits"),
        help="logits: any variant can be computed from the file alone",
    )
    group.add_argument("--redact", action="store_true", help="record no token ids and no text")
    group.add_argument("--durable", action="store_true", help="sync every commit to the disk")
    group.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    with running.signals():
        return generate.stream(args)
