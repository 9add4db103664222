"""The router alone, from one token to a long prompt; see `engine_router.py`."""

from __future__ import annotations

from typing import Any

import measure
from asked import Asked
from child import Child

Figures = dict[str, Any]
CASES = (
    (1, 64, 8, False),
    (1, 128, 8, False),
    (1, 256, 8, True),
    (512, 64, 8, False),
    (4096, 128, 8, False),
    (8192, 512, 10, False),
)
OURS = ("moescope C call", "moescope native", "moescope route, torch")
SECONDS = 0.2


def run(asked: Asked) -> Figures:
    found: Figures = {}
    with Child("engine_router.py", threads=asked.threads) as child:
        child.ask("load", threads=asked.threads)
        for T, E, K, grouped in CASES:
            name = f"T={T} E={E} K={K}" + (" grouped" if grouped else "")
            said = child.ask("case", T=T, E=E, K=K, grouped=grouped)
            seconds = SECONDS if asked.rounds > 1 else SECONDS / 20
            turns = measure.rounds(
                {name: lambda seconds=seconds: child.ask("time", seconds=seconds)},
                asked,
            )
            found[name] = compared(turns, name, said)
    missing = {way: why for case in found.values() for way, why in case.pop("missing").items()}
    return {"missing": missing, "cases": found}


def compared(turns: list[Figures], name: str, said: Figures) -> Figures:
    """Microseconds, and how many times faster than each peer ours are, paired by turn."""
    ways = said["ways"]
    clean = [turn for turn in turns if not turn["noisy"]] or turns
    return {
        "microseconds": measure.medians(turns, name, ways),
        "faster than": {
            ours: {
                way: measure.summary(turn[way] / turn[ours] for turn in clean)
                for way in ways
                if way not in OURS
            }
            for ours in OURS
            if ours in ways
        },
        "missing": said["missing"],
    }
