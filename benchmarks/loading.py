"""Loading: seconds and GB/s from files to a model that can run, against reading the same bytes.

Every turn is a process of its own; importing libraries is not counted (see `start.py`). Warm: the
files are in the system's cache. Cold: they were dropped from it, where the system does so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import measure
from asked import Asked
from child import Child, Unavailable
from weights import GGUF

Figures = dict[str, Any]
BASE = "reading, into place"
COLD = "cold: "


def run(asked: Asked) -> Figures:
    folder, threads = str(asked.model), asked.threads
    model = {"folder": folder, "threads": threads}
    contestants: dict[str, Callable[[], Figures]] = {
        "reading, through a buffer": partial(
            _once, asked, "engine_reading.py", "read", folder=folder, place=False
        ),
        BASE: partial(_once, asked, "engine_reading.py", "read", folder=folder, place=True),
        "moescope": partial(_once, asked, "engine_moescope.py", "load", **model),
        "transformers": partial(_once, asked, "engine_transformers.py", "load", **model),
        "llama.cpp": partial(
            _once, asked, "engine_llama.py", "load", file=str(asked.model / GGUF), threads=threads
        ),
    }
    missing = {}
    for name in list(contestants):
        try:
            contestants[name]()  # warm
        except Unavailable as error:
            missing[name] = str(error)
            del contestants[name]
    turns = measure.rounds(contestants, asked, min(asked.rounds, 3))
    cold = {COLD + name: partial(_cold, asked, contestants[name]) for name in (BASE, "moescope")}
    turns += measure.rounds(cold, replace(asked, retries=0), min(asked.rounds, 2))
    return {
        "missing": missing,
        "loaders": {
            n: measure.medians(turns, n, ("load_s", "gb_s")) for n in (*contestants, *cold)
        },
        "time over reading": {
            name: measure.ratios(turns, name, BASE, "load_s")
            for name in contestants
            if name != BASE
        },
        "time over reading, cold": measure.ratios(turns, COLD + "moescope", COLD + BASE, "load_s"),
        "turns": turns,
    }


def _once(asked: Asked, script: str, do: str, **request: Any) -> Figures:
    with Child(script, threads=asked.threads) as child:
        seconds = child.ask(do, **request)["seconds"]
    return {"load_s": seconds, "gb_s": 2 * asked.shapes.parameters / seconds / 1e9}


def _cold(asked: Asked, contestant: Callable[[], Figures]) -> Figures:
    with Child("engine_reading.py", threads=asked.threads) as child:
        child.ask("forget", folder=str(asked.model))
    return contestant()
