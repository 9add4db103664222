"""Decode of the peers that are slow here or need all the memory: each alone, with fewer tokens.

`batched_mm` copies the weights of every chosen expert, and MLX multiplies experts on the CPU in
float32 only, so it reads twice the bytes; both are far from the others, and one turn says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import decode
import measure
from asked import Asked
from child import Child, Unavailable

Figures = dict[str, Any]
MODES = ("eager compiled", "batched_mm", "batched_mm compiled")
GPU_ONLY = ("deepgemm", "sonicmoe")
TOKENS = 16
SHORT = 16  # a prompt for modes whose first token is that of the same mode uncompiled


def run(asked: Asked) -> Figures:
    few = replace(asked, tokens=min(asked.tokens, TOKENS), rounds=1, retries=0)
    found: Figures = {"engines": {}, "missing": {}, "turns": []}
    for mode in GPU_ONLY:
        found["missing"][f"transformers {mode}"] = "needs a GPU"
    with Child("bandwidth.py", threads=asked.threads) as reader:
        reader.ask("load", threads=asked.threads, size=asked.read_bytes)
        found["read_gb_s"] = reader.ask("read", repeats=5)["gb_s"]
    for mode in MODES:
        request = {"mode": mode}
        place = {"folder": str(asked.model), "threads": asked.threads}
        _alone(found, f"transformers {mode}", "engine_transformers.py", place, request, few, 2)
    for dtype, item in (("bfloat16", 2), ("float32", 4)):
        place = {"folder": str(asked.model), "dtype": dtype}
        _alone(found, f"mlx-lm {dtype}", "engine_mlx.py", place, {}, few, item)
    return found


def _alone(
    found: Figures,
    name: str,
    script: str,
    place: Figures,
    request: Figures,
    asked: Asked,
    item: int,
) -> None:
    """One engine, loaded, warmed where it compiles, measured, and gone."""
    ids = asked.prompt_ids()
    timed = ids[:SHORT] if name.endswith("compiled") else ids
    measure.say(f"  alone: {name}")
    with Child(script, threads=asked.threads) as child:
        try:
            child.ask("load", **place)
            # a short prompt and enough steps: what is compiled is compiled
            child.ask("decode", prompt=ids[:4], tokens=asked.tokens, **request)

            def take() -> Figures:
                answer = child.ask("decode", prompt=timed, tokens=asked.tokens, **request)
                return decode.turn(answer, asked, item)

            turns = measure.rounds({name: take}, asked)
        except Unavailable as error:
            found["missing"][name] = str(error)
            return
    keys = decode.KEYS if timed is ids else decode.KEYS[:-1]
    found["engines"][name] = measure.medians(turns, name, keys)
    found["turns"] += turns
