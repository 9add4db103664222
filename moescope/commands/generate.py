"""Stream text from a model on standard output; with --json, one JSON document at the end."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moescope.commands import options, running
from moescope.commands.shadows import Tally


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_prompt(parser)
    options.add_sampling(parser)
    parser.add_argument(
        "--variant", default="trained", metavar="NAME", help="a variant expression (see: variants)"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    with running.signals():
        return stream(args)


def stream(args: argparse.Namespace) -> int:
    """Run one prompt to its end, recording where `--output` says so; returns the exit code."""
    from moescope.engine.protocol import Generate
    from moescope.engine.session import Session

    prompt = options.prompt_of(args)
    request = Generate(**prompt, sampling=options.sampling_of(args))
    loaded, model, tokenizer = running.load(args)
    with running.recording(args, loaded, model, tokenizer) as writer:
        session = Session(
            model,
            tokenizer,
            writer,
            record=getattr(args, "record", "ids"),
            max_context=args.max_context,
            variants=(args.variant,),
            shadows=getattr(args, "shadow", ()),
        )
        tally = Tally()
        try:
            _print_stream(session, request, tally, quiet=args.json)
        finally:
            session.close()
        running.tell(session.take_events())
        if args.json:
            document = summary(session, model, args)
            if session.shadows:
                document["shadows"] = tally.document()
            options.print_json(document)
        for line in tally.lines():
            running.talk(line)
        if writer is not None:
            running.talk(f"{args.output}: {writer.acknowledged} tokens recorded")
    return running.ending(session.invalid, session.recorder.failure is not None)


def _print_stream(session: Any, request: Any, tally: Tally, *, quiet: bool) -> None:
    from moescope.safety import printable

    prompt_length = None
    for frame in session.generate(request):
        tally.add(frame)
        if prompt_length is None:
            prompt_length = len(session.lanes[0].prompt_ids)
        if not quiet and frame.position >= prompt_length:
            sys.stdout.write(printable(frame.text))
            sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n")


def summary(session: Any, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    lane = session.lanes[0]
    spent = session.timings
    return {
        "model": model.facts["name"],
        "family": model.facts["family"],
        "device": model.interpreter.device,
        "dtype": model.interpreter.dtype,
        "variant": lane.expression,
        "prompt_ids": lane.prompt_ids,
        "token_ids": lane.new_ids,
        "text": lane.text,
        "finish_reason": lane.reason,
        "error": session.invalid or None,
        "timings": {name: round(value, 6) for name, value in spent.items()},
    }
