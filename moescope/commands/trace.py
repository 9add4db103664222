"""Stream text like `generate`, and record every routing decision into a .moetrace file.

With --golden, record what `moescope check` compares with: a few prompts (built in, or the one
given), decoded greedily.
"""

from __future__ import annotations

import argparse

from moescope.commands import generate, options, running
from moescope.errors import MoescopeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)
    parser.add_argument(
        "--shadow",
        action="append",
        default=[],
        metavar="NAME",
        help="also record what this variant would have picked on the same logits; repeatable",
    )
    parser.add_argument("--golden", action="store_true", help="make a golden for `moescope check`")
    options.add_recording(parser, required=True)


def run(args: argparse.Namespace) -> int:
    with running.signals():
        return _golden(args) if args.golden else generate.stream(args)


def _golden(args: argparse.Namespace) -> int:
    from moescope.diagnosis.golden import NEW_TOKENS, record_golden

    if args.redact or args.shadow or args.temperature or args.record != "weights":
        raise MoescopeError(
            "--golden: records ids and weights of greedy decoding, with token ids",
            hint="leave out --redact, --shadow, --temperature and --record",
        )
    given = any(getattr(args, name) is not None for name in ("prompt", "prompt_ids", "messages"))
    prompts = [options.prompt_of(args)] if given else []
    loaded, model, tokenizer = running.load(args)
    with running.recording(args, loaded, model, tokenizer) as writer:
        session = record_golden(
            model,
            tokenizer,
            writer,
            prompts=prompts,
            variant=args.variant,
            new_tokens=args.max_new_tokens if given else NEW_TOKENS,
            max_context=args.max_context,
        )
        recorded = writer.acknowledged
    running.tell(session.take_events())
    if args.json:
        facts = {"model": model.facts["name"], "dtype": model.interpreter.dtype}
        options.print_json(
            {**facts, "sequences": session.sequence + 1, "tokens": recorded, "golden": args.output}
        )
    running.talk(f"{args.output}: {recorded} tokens recorded")
    return running.ending(session.invalid, session.recorder.failure is not None)
