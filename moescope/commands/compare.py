"""Run router variants side by side on the same weights: where they part, and how far they agree.

Each lane writes its own text; with --teacher-forced all lanes are fed what the first one writes, so
that every difference is the router's own.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from moescope.commands import options, running
from moescope.errors import MoescopeError

WIDTH = 92


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="NAME",
        help="a variant expression; give two to eight (one is compared with trained)",
    )
    parser.add_argument("--teacher-forced", action="store_true", help="feed all what A writes")
    options.add_prompt(parser)
    options.add_sampling(parser)
    options.add_recording(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.diagnosis.compare_run import run_compare
    from moescope.engine.protocol import MAX_LANES, Generate

    variants = args.variants if len(args.variants) > 1 else ["trained", *args.variants]
    if not 2 <= len(variants) <= MAX_LANES:
        raise MoescopeError(f"--variant: expected two to {MAX_LANES}, found {len(variants)}")
    request = Generate(**options.prompt_of(args), sampling=options.sampling_of(args))
    with running.signals():
        loaded, model, tokenizer = running.load(args)
        with running.recording(args, loaded, model, tokenizer) as writer:
            outcome = run_compare(
                model,
                tokenizer,
                variants,
                request,
                teacher_forced=args.teacher_forced,
                writer=writer,
                max_context=args.max_context,
            )
    if args.json:
        mode = "same tokens" if args.teacher_forced else "free"
        options.print_json({"model": model.facts["name"], "mode": mode, **outcome.to_json()})
    else:
        _print(outcome, args.teacher_forced)
    for message in (outcome.invalid, outcome.stopped):
        if message:
            running.talk(message)
    return running.ending(outcome.invalid, bool(outcome.stopped))


def _print(outcome: Any, teacher_forced: bool) -> None:
    for lane in outcome.lanes:
        full = "  (the context is full: --max-context)" if lane.reason == "context" else ""
        print(f"{_letter(lane.lane)}  {lane.variant}{full}")
        text = options.plain(lane.text.strip("\n")) or f"ids {lane.token_ids}"
        for line in text.splitlines():
            print(textwrap.indent(textwrap.fill(line, WIDTH), "   "))
    fed = "all lanes fed lane A's text" if teacher_forced else "each lane writes its own text"
    for found in outcome.comparisons:
        print(f"\n{_letter(found.lane_a)} and {_letter(found.lane_b)}: {fed}")
        for label, value in _rows(found):
            print(f"   {label:<34} {value}")


def _rows(found: Any) -> list[tuple[str, str]]:
    same, late = found.same_ids.all, found.compounded.all
    first = found.first_divergence
    rows = [("texts part at token", _at(found.ids_part_at))]
    if first is None:
        rows.append(("first other experts", "never, on the same tokens"))
    else:
        margins = f"margins {_number(first.margin_a)} and {_number(first.margin_b)}"
        rows.append(("first other experts", f"@{first.position} L{first.layer}, {margins}"))
    for title, part in (("on the same tokens", same), ("after the texts parted", late)):
        if part.tokens:
            rows += [
                (f"{title}: tokens", str(part.tokens)),
                ("   same set of experts", _share(part.same_set)),
                ("   same order", _share(part.same_order)),
                ("   mean |Δ weight|", _number(part.weight_difference)),
                ("   Σ of each", f"{_number(part.score_sum_a)}  {_number(part.score_sum_b)}"),
            ]
    if found.kl_tokens:
        rows.append(("KL of the next token, mean", f"{_number(found.kl_mean)} nats"))
        rows.append(("same most likely next token", _share(found.top1_agrees)))
    return rows


def _letter(lane: int) -> str:
    return "ABCDEFGH"[lane]


def _at(position: int | None) -> str:
    return "never" if position is None else f"@{position}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
