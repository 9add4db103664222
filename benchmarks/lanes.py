"""What N lanes cost over one, beside the bytes of the union of their experts.

`equal`: the same variant, hence the same tokens and routes. `variants`: each lane its own variant
and its own tokens. `same tokens`: each its own variant, all fed what the first one draws. All of
them are open side by side and take turns of a few steps, so that each ratio is of neighbours in
time; a cost is the median of those ratios. The bound is the bytes of a step over those of one lane,
with U from the recorded ids of that very run: (S + e·U + N·c) / (S + e·K + c), c what a lane's
cache holds.
"""

from __future__ import annotations

import statistics
from typing import Any

import measure
from asked import Asked
from child import Child

Figures = dict[str, Any]
COUNTS = (2, 4, 8)
BLOCK, SKIP = 6, 2  # steps of a block, and those of them that are not counted
ROUNDS = 12  # of blocks in a turn
PROMPT = 32  # tokens: 43 lanes read it, one after the other
VARIANTS = (
    "trained",
    "softmax_over_selected",
    "always_renormalised",
    "wrong_scoring_func",
    "raw_logits_as_weights",
    "double_softmax",
    "router_logit_scale=2",
    "router_quantised",
)


def asks() -> dict[str, Figures]:
    wanted: dict[str, Figures] = {"1": {"variants": VARIANTS[:1]}}
    for count in COUNTS:
        wanted[f"{count} equal"] = {"variants": VARIANTS[:1] * count}
        wanted[f"{count} variants"] = {"variants": VARIANTS[:count]}
        wanted[f"{count} same tokens"] = {"variants": VARIANTS[:count], "same_tokens": True}
    return wanted


def run(asked: Asked) -> Figures:
    rounds = ROUNDS if asked.tokens > BLOCK + SKIP + 2 else 2
    with Child("engine_lanes.py", threads=asked.threads) as child:
        loaded = child.ask("load", folder=str(asked.model), threads=asked.threads)

        def take() -> Figures:
            return child.ask(
                "alternate_lanes",
                prompt=asked.prompt_ids()[:PROMPT],
                asks=asks(),
                rounds=rounds,
                block=BLOCK,
                skip=SKIP,
            )

        turns = measure.rounds({"lanes": take}, asked, asked.rounds)
    clean = [turn for turn in turns if not turn["noisy"]]
    return {
        "kernels": loaded["kernels"],
        "lanes": compared(clean or turns, asked, noisy=not clean),
        "turns": turns,
    }


def compared(turns: list[Figures], asked: Asked, *, noisy: bool = False) -> Figures:
    """`steps` of every turn: name -> the median step of each block; `distinct`: name -> experts."""
    found: Figures = {}
    one = [step for turn in turns for step in turn["steps"]["1"]]
    held = statistics.median(turn["tokens"] for turn in turns)
    for name in turns[0]["steps"]:
        own = [step for turn in turns for step in turn["steps"][name]]
        cost = measure.resampled(a / b for a, b in zip(own, one, strict=True))
        distinct = statistics.mean(turn["distinct"][name] for turn in turns)
        bound = asked.shapes.bound(distinct, int(name.split()[0]), held)
        found[name] = {
            "cost": {**cost, "noisy": True} if noisy else cost,
            "distinct_experts": round(distinct, 2),
            "bound": round(bound, 4),
            "over_bound": round(cost["median"] / bound, 4),
            "step_s": {"median": round(statistics.median(own), 6)},
        }
    return found
