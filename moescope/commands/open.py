"""Open the screen on a model or a trace; without PATH, on the embedded demo model.

PATH is a checkpoint folder, org/name from the local hub cache, or a .moetrace file.
"""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path

from moescope.commands import options, reading
from moescope.errors import ExitCode, MoescopeError

SQLITE_MAGIC = b"SQLite format 3\0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "moescope [PATH] [options]"
    options.add_model(parser, optional=True)
    parser.add_argument(
        "--beside",
        metavar="MODEL2",
        default="",
        help="another checkpoint with the same routers, lane for lane beside PATH",
    )
    parser.add_argument("--prompt", metavar="T", default="", help="begin with this prompt")
    options.add_sampling(parser)
    parser.set_defaults(max_new_tokens=256)
    options.add_recording(parser, record="logits")


def run(args: argparse.Namespace) -> int:
    from moescope.ui.app import run as run_app

    if args.model is not None and _is_trace(Path(args.model)):
        if args.beside:
            raise MoescopeError(
                "--beside: expected a checkpoint in PATH, found a trace",
                hint="moescope replay FILE --model MODEL names the router of a trace",
            )
        reading.look_through(Path(args.model))
        return run_app(None, replay=Path(args.model))
    request = options.request_of(
        args,
        record=args.record,
        trace_path=args.output,
        redact=args.redact,
        durable=args.durable,
        force=args.force,
    )
    sampling = options.sampling_of(args)
    return run_app(request, replay=None, prompt=args.prompt, sampling=sampling)


def need_path(name: str | None) -> None:
    """Say of a word that names nothing what it may have been meant to be."""
    from moescope.cli import VERBS
    from moescope.safety import single_line

    if name is None or name == "demo" or os.path.lexists(name):
        return
    if "/" in name:
        from moescope.engine import hub_cache

        if hub_cache.is_hub_name(name):
            hub_cache.find(name)
            return
        message = f"{single_line(name, 300)}: no such file or folder"
        raise MoescopeError(message, code=ExitCode.CHECKPOINT)
    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"moescope {near[0]}" if near else "moescope --help"
    message = f"{single_line(name, 60)}: there is no such command, file or folder"
    raise MoescopeError(message, hint=hint)


def _is_trace(path: Path) -> bool:
    """By content: a regular file that begins as SQLite files do."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False
