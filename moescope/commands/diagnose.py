"""Name the router that made a trace: the trained one, a known fault, or none of these.

TRACE is what another engine chose for known tokens: a .moetrace, the long form (Parquet, CSV,
JSONL; only position, token_id, layer and expert_ids are needed, weights help), or an array of
experts [tokens, layers, K] (.npy, .npz; vLLM's) or counts [layers, experts] with --tokens. MODEL is
run on the same tokens under every hypothesis that means something for it.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

from moescope.commands import options, running
from moescope.errors import ExitCode

WIDTH = 92
LABEL = 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a checkpoint folder, org/name, or demo"
    )
    parser.add_argument(
        "--tokens", metavar="FILE", help="the token ids that were fed: JSON, text or .npy"
    )
    parser.add_argument(
        "--lane", type=options.natural, default=0, metavar="N", help="of a comparison's trace"
    )
    parser.add_argument(
        "--max-tokens",
        type=options.positive,
        default=256,
        metavar="N",
        help="look at so many; the cost is hypotheses × tokens (default 256)",
    )
    parser.add_argument(
        "--evidence",
        default="auto",
        choices=("auto", "weights", "order", "sets"),
        help="use no more than this of what was recorded",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    options.add_json(parser)
    parser.set_defaults(devices=())


def run(args: argparse.Namespace) -> int:
    from moescope.diagnosis import evidence, verdict

    args.max_context = args.max_tokens
    with running.signals():
        _, model, _ = running.load(args)
        interpreter = model.interpreter
        found = evidence.read(
            args.trace,
            interpreter.routers,
            layers=len(interpreter.spec.layers),
            vocabulary=interpreter.vocab_size,
            tokens=args.tokens,
            lane=args.lane,
            limit=args.max_tokens,
        )
        for note in found.notes:
            running.talk(note)
        if args.evidence != "auto":
            found = found.reduced(args.evidence)
        if found.counts is None:  # counts are of all tokens
            found = found.cut(args.max_tokens)
        progress = _Progress()
        try:
            made = verdict.diagnose(model, found, watch=progress.show)
        finally:
            progress.clear()
    if args.json:
        options.print_json(made.to_json())
    else:
        _print(made, model)
    return int(ExitCode.DONE if made.verdict == "trained" else ExitCode.FOUND)


def _print(made: Any, model: Any) -> None:
    from moescope.diagnosis.words import headline, lines

    print(options.plain(headline(made)))
    for label, text in lines(made, model):
        first, *rest = textwrap.wrap(options.plain(text), WIDTH - LABEL) or [""]
        print(f"  {label:<{LABEL}}{first}")
        for more in rest:
            print(" " * (LABEL + 2) + more)


class _Progress:
    """One line on standard error, only where somebody is looking."""

    def __init__(self) -> None:
        self.shown = False

    def show(self, what: str, at: int, of: int) -> None:
        if sys.stderr.isatty():
            self.shown = True
            text = options.plain(f"{at + 1} of {of}: {what}")[:78]
            sys.stderr.write(f"\r{text:<78}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r" + " " * 78 + "\r")
            sys.stderr.flush()
