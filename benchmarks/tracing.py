"""What recording costs: off, ids, weights, logits into a real file; and four shadow variants.

Ratios of step times, paired by round; rounds are twice as many as elsewhere, since one per cent is
what is looked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import measure
from asked import Asked
from child import Child, Unavailable
from lanes import VARIANTS

Figures = dict[str, Any]
LEVELS = ("off", "ids", "weights", "logits")
SHADOWS = "weights, 4 shadows"


def run(asked: Asked) -> Figures:
    missing: dict[str, str] = {}
    with Child("engine_moescope.py", threads=asked.threads) as child:
        loaded = child.ask("load", folder=str(asked.model), threads=asked.threads)
        contestants = {level: _asks(child, asked, record=level) for level in LEVELS}
        shadowed = _asks(child, asked, record="weights", shadows=VARIANTS[1:5])
        try:
            shadowed()
            contestants[SHADOWS] = shadowed
        except Unavailable as error:
            missing[SHADOWS] = str(error)
        contestants["off"]()
        turns = measure.rounds(contestants, asked, 2 * asked.rounds)
    found: Figures = {
        "kernels": loaded["kernels"],
        "missing": missing,
        "levels": {
            name: measure.medians(turns, name, ("step_s", "closing_s", "trace_bytes"))
            for name in contestants
        },
        "cost over off": {
            name: measure.ratios(turns, name, "off", "step_s") for name in LEVELS[1:]
        },
    }
    if SHADOWS in contestants:
        found["4 shadows over 0"] = measure.ratios(turns, SHADOWS, "weights", "step_s")
    return {**found, "turns": turns}


def _asks(child: Child, asked: Asked, **request: Any) -> Callable[[], Figures]:
    def take() -> Figures:
        answer = child.ask("decode", prompt=asked.prompt_ids(), tokens=asked.tokens, **request)
        return {
            "step_s": statistics.median(answer["steps"][asked.skip :]),
            "closing_s": answer["closing"],
            "trace_bytes": answer["trace_bytes"],
        }

    return take
