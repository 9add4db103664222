"""Open a recorded trace on the screen. Needs no model and no backend.

Without FILE, the recording that comes with moescope.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moescope.commands import reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="a .moetrace file")
    parser.add_argument(
        "--model", metavar="MODEL", default="", help="its checkpoint: d names the router"
    )


def run(args: argparse.Namespace) -> int:
    from moescope.demo import TRACE
    from moescope.ui.app import run as run_app

    if args.file:
        reading.look_through(Path(args.file))
    beside = args.model or ("" if args.file else "demo")
    return run_app(None, replay=Path(args.file) if args.file else TRACE, beside=beside)
