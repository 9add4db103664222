"""What recording costs: off, ids, weights, logits into real files; and four shadow variants.

One per cent is looked for where machines wander by ten, so levels alternate every few tokens in one
session on one model, in an order drawn anew each time: each goes through the same text, caches and
neighbours. A cost is the median over blocks of a block's median step over that of the block without
recording in the same round, with an interval from resampling the rounds.

The first steps of a block are not counted: what the block before left to its writer's thread runs
beside them. A trace is folded into a chunk every 256 tokens, which a median does not see: what that
takes is timed by itself and stands beside the costs, a token's share of it.
"""

from __future__ import annotations

import statistics
from typing import Any

import measure
from asked import Asked
from child import Child
from lanes import VARIANTS

Figures = dict[str, Any]
OFF, SHADOWS = "off", "weights, 4 shadows"
LEVELS = ("ids", "weights", "logits")
BLOCK, SKIP = 10, 2  # steps of a block, and those of them that are not counted
ROUNDS = 20  # of blocks in a turn


def run(asked: Asked) -> Figures:
    asks = {level: {"record": level} for level in (OFF, *LEVELS)}
    asks[SHADOWS] = {"record": "weights", "shadows": VARIANTS[1:5]}
    rounds = ROUNDS if asked.tokens > BLOCK else 2
    with Child("engine_moescope.py", threads=asked.threads) as child:
        loaded = child.ask("load", folder=str(asked.model), threads=asked.threads)

        def take() -> Figures:
            return child.ask(
                "alternate",
                prompt=asked.prompt_ids(),
                asks=asks,
                rounds=rounds,
                block=BLOCK,
                skip=SKIP,
            )

        turns = measure.rounds({"levels": take}, asked, 2 * asked.rounds)
    for turn in turns:
        turn["blocks"] = {
            name: [round(statistics.median(steps), 7) for steps in found]
            for name, found in turn["blocks"].items()
        }
    clean = [turn for turn in turns if not turn["noisy"]]
    return {"kernels": loaded["kernels"], **compared(clean or turns, not clean), "turns": turns}


def compared(turns: list[Figures], noisy: bool) -> Figures:
    """`blocks` of every turn: name -> the median step of each of its rounds."""
    names = list(turns[0]["blocks"])
    medians = {name: [step for turn in turns for step in turn["blocks"][name]] for name in names}
    step = {name: statistics.median(found) for name, found in medians.items()}

    def cost(name: str, base: str) -> Figures:
        pairs = zip(medians[name], medians[base], strict=True)
        return {**measure.resampled(a / b for a, b in pairs), **({"noisy": True} if noisy else {})}

    levels = {}
    for name in names:
        folding = statistics.median(turn["folding"].get(name, 0.0) for turn in turns)
        held = statistics.median(turn["bytes_a_token"].get(name, 0) for turn in turns)
        levels[name] = {"step_s": step[name], "folding_s": folding, "bytes_a_token": round(held)}
    return {
        "levels": levels,
        "cost over off": {name: cost(name, OFF) for name in LEVELS},
        "4 shadows over 0": cost(SHADOWS, "weights"),
    }
