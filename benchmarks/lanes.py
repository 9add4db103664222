"""What N lanes cost over one, beside the bytes of the union of their experts.

`equal`: the same variant, hence the same tokens and routes. `variants`: each lane its own variant
and its own tokens. `same tokens`: each its own variant, all fed what the first one draws. The bound
is (S + e·U) / (S + e·K) with U from the recorded ids of that very run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import measure
from asked import Asked
from child import Child

Figures = dict[str, Any]
COUNTS = (2, 4, 8)
ROUNDS = 3  # at most: eight lanes take their time
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
KINDS: dict[str, Callable[[int], Figures]] = {
    "equal": lambda count: {"variants": VARIANTS[:1] * count},
    "variants": lambda count: {"variants": VARIANTS[:count]},
    "same tokens": lambda count: {"variants": VARIANTS[:count], "same_tokens": True},
}


def run(asked: Asked) -> Figures:
    with Child("engine_moescope.py", threads=asked.threads) as child:
        loaded = child.ask("load", folder=str(asked.model), threads=asked.threads)
        contestants = {"1": _asks(child, asked, {})}
        for count in COUNTS:
            for kind, request in KINDS.items():
                contestants[f"{count} {kind}"] = _asks(child, asked, request(count))
        contestants[f"{COUNTS[-1]} equal"]()  # caches for all lanes are made, all paths taken once
        contestants[f"{COUNTS[-1]} variants"]()
        rounds = min(asked.rounds, ROUNDS)
        turns = measure.rounds(contestants, asked, rounds)
    return {
        "kernels": loaded["kernels"],
        **compared(turns, asked, list(contestants)),
        "turns": turns,
    }


def compared(turns: list[Figures], asked: Asked, names: list[str]) -> Figures:
    found: Figures = {}
    for name in names:
        distinct = statistics.median(turn["distinct"] for turn in turns if turn["name"] == name)
        cost = measure.ratios(turns, name, "1", "step_s")
        bound = asked.shapes.bound(distinct)
        found[name] = {
            "cost": cost,
            "distinct_experts": round(distinct, 2),
            "bound": round(bound, 4),
            "over_bound": round(cost["median"] / bound, 4),
            **measure.medians(turns, name, ("step_s",)),
        }
    return {"lanes": found}


def _asks(child: Child, asked: Asked, request: Figures) -> Callable[[], Figures]:
    tokens = max(asked.skip + 4, asked.tokens // 2)
    more = {"prompt": asked.prompt_ids(), "tokens": tokens, "record": "weights", **request}

    def take() -> Figures:
        answer = child.ask("decode", **more)
        return {
            "step_s": statistics.median(answer["steps"][asked.skip :]),
            "distinct": statistics.mean(answer["distinct"][asked.skip :]),
        }

    return take
