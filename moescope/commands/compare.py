"""Run router variants side by side on the same weights, or two checkpoints: where they part, how
far they agree, and whether the gate or its input made the difference.

Free, each lane writes its own text. With the same tokens (--teacher-forced: what lane A writes;
--text: a file), every difference is the router's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moescope.commands import compared, options, running
from moescope.errors import MoescopeError

TEXT_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "beside",
        metavar="MODEL2",
        nargs="?",
        default="",
        help="another checkpoint with the same routers: lane B",
    )
    parser.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="NAME",
        help="a variant expression; two to eight (one: beside trained); of MODEL2, the second",
    )
    parser.add_argument("--teacher-forced", action="store_true", help="feed all what A writes")
    parser.add_argument("--text", metavar="FILE", type=Path, help="feed all this text; no prompt")
    parser.add_argument(
        "--tokens",
        type=options.positive,
        default=512,
        metavar="N",
        help="of --text, the first N (default 512)",
    )
    parser.add_argument(
        "--rows", action="store_true", help="with --json, every token and layer of the comparison"
    )
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="also force A's routing into the others, rung by rung, on A's text",
    )
    options.add_prompt(parser)
    options.add_sampling(parser)
    options.add_recording(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    with running.signals():
        outcome, sides = _compared(args)
        ladders = _ladders(outcome, sides) if args.ladder and not outcome.invalid else []
    how = _how(args)
    if args.json:
        names = {"model": sides[0].name} | ({"model2": sides[1].name} if args.beside else {})
        climbed = {"ladders": [ladder.to_json() for ladder in ladders]} if args.ladder else {}
        options.print_json({**names, **how, **outcome.to_json(), **climbed})
    else:
        models = [side.name for side in sides] if args.beside else []
        print("\n".join(compared.lines(outcome, how, models)))
        for ladder in ladders:
            print("\n".join(compared.ladder_lines(ladder)))
    for message in (outcome.invalid, outcome.stopped):
        if message:
            running.talk(message)
    return running.ending(outcome.invalid, bool(outcome.stopped))


def _check(args: argparse.Namespace) -> None:
    from moescope.engine.protocol import MAX_LANES

    if args.beside and len(args.variants) > 2:
        raise MoescopeError(f"--variant: expected at most two, found {len(args.variants)}")
    if len(args.variants) > MAX_LANES:
        raise MoescopeError(f"--variant: expected two to {MAX_LANES}, found {len(args.variants)}")
    if not args.beside and not args.variants:
        raise MoescopeError(
            "nothing to compare: expected --variant or a second model, found neither",
            hint="moescope variants MODEL, for the variants there are",
        )
    if args.text is not None:
        given = ("prompt", "prompt_ids", "messages")
        others = [name for name in given if getattr(args, name) is not None]
        if others or args.teacher_forced:
            other = "--" + (others[0].replace("_", "-") if others else "teacher-forced")
            raise MoescopeError(f"expected one text, found --text and {other}")
    if args.rows and not args.json:
        raise MoescopeError("--rows: expected --json beside it")


def _how(args: argparse.Namespace) -> dict[str, str]:
    """How the lanes were fed, for labels and for JSON."""
    if args.text is not None:
        return {"mode": "same tokens", "text": options.plain(args.text.name)}
    if args.teacher_forced:
        return {"mode": "same tokens", "text": "lane A's"}
    return {"mode": "free", "text": "each lane's own"}


def _text_ids(args: argparse.Namespace, tokenizer: Any) -> tuple[int, ...]:
    """The first `--tokens` ids of the text file."""
    if tokenizer is None:
        raise MoescopeError("this model has no tokenizer", hint="--prompt-ids 1,2,3")
    name = args.text.name
    try:
        with open(args.text, encoding="utf-8") as file:
            text = file.read(TEXT_BYTES)
    except OSError as error:
        raise MoescopeError(f"{name}: {(error.strerror or 'cannot be read').lower()}") from None
    except UnicodeDecodeError:
        raise MoescopeError(f"{name}: expected text in UTF-8") from None
    ids = tuple(tokenizer.encode(text))
    kept = ids[: min(args.tokens, args.max_context)]
    if not kept:
        raise MoescopeError(f"{name}: expected some text, found none")
    if len(kept) < len(ids):
        running.talk(f"{name}: the first {len(kept)} of {len(ids)} tokens (--tokens)")
    return kept


def _ladders(outcome: Any, sides: Any) -> list[Any]:
    """A's routing forced into each of the others, on what A was fed and wrote."""
    from moescope.diagnosis.ladder import climb

    first = outcome.lanes[0]
    ids = [*first.prompt_ids, *first.token_ids]
    return [climb(sides[0], other, ids) for other in sides[1:]]


def _compared(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Variants of one model, or one model beside another; the outcome, and what each lane ran."""
    from moescope.diagnosis.compare_run import run_compare
    from moescope.diagnosis.two_models import sides_of
    from moescope.engine.protocol import Generate, Sampling

    variants, models = _asked(args)
    sampling = options.sampling_of(args)
    prompt = None if args.text is not None else options.prompt_of(args)
    loaded, model, tokenizer = running.load(args)
    if prompt is None:
        prompt, sampling = {"prompt_ids": _text_ids(args, tokenizer)}, Sampling(max_new_tokens=0)
    with running.recording(args, loaded, model, tokenizer) as writer:
        outcome = run_compare(
            model,
            tokenizer,
            variants,
            Generate(**prompt, sampling=sampling),
            models=models,
            teacher_forced=args.teacher_forced or args.text is not None,
            writer=writer,
            max_context=args.max_context,
            keep_rows=args.rows,
        )
    return outcome, sides_of(model, tokenizer, variants, models)


def _asked(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The variant of every lane, and which of two models runs it."""
    if args.beside:
        variants = [*args.variants, *args.variants, "trained", "trained"]
        return variants[:2], [0, 1]
    variants = args.variants if len(args.variants) > 1 else ["trained", *args.variants]
    return variants, [0] * len(variants)
