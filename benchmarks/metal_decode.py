"""moescope beside mlx-lm on Metal: decode, time to first token, peak memory, share of bandwidth.

Random weights of a seed in the shapes of OLMoE-1B-7B (half its layers where they are not
quantised), written as mlx-lm publishes them. Each engine is a process of its own; they take turns,
and ratios are of turns of the same round. moescope writes its trace meanwhile.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from child import Child
from metal_speed import bandwidth
from metal_steps import Figures, begin
from mlx_decode import Shapes, write

OLMOE = {"hidden": 2048, "width": 1024, "vocab": 50304}
TINY = Shapes(layers=2, hidden=128, width=64, experts=8, chosen=2, heads=4, vocab=512)
ENGINES = ("moescope", "mlx-lm")
ITEM = {"float32": 4.0, "bfloat16": 2.0}
SKIP = 4  # tokens until a run is warm


def main() -> int:
    asked, put = begin(__doc__, bits=0, layers=0, rounds=6, tokens=160, prompt=512)
    shapes = Shapes(layers=asked.layers or (16 if asked.bits else 8), bits=asked.bits, **OLMOE)
    dtype = "bfloat16" if mx.metal.is_available() else "float32"
    rounds, tokens, length = asked.rounds, asked.tokens, asked.prompt
    if asked.tiny:
        shapes = replace(TINY, bits=asked.bits)
        rounds, tokens, length = 2, 8, 12
    read = bandwidth(asked.tiny)["gb_s"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write(Path(folder), shapes, dtype)
        children, loaded = {}, {}
        for name in ENGINES:
            engine = stack.enter_context(Child("metal_engine.py", threads=4))
            loaded[name] = engine.ask("load", engine=name, folder=folder, dtype=dtype)
            children[name] = engine
        prompt = [(7 * n) % shapes.vocab for n in range(length)]
        for engine in children.values():
            engine.ask("decode", prompt=prompt, tokens=SKIP + 2)
        turns: dict[str, list[Figures]] = {name: [] for name in ENGINES}
        for number in range(rounds):
            for name in ENGINES[:: 1 if number % 2 else -1]:
                answer = children[name].ask("decode", prompt=prompt, tokens=tokens)
                turns[name].append(turn(answer))
                print(f"round {number + 1} of {rounds}: {name}: {turns[name][-1]}", flush=True)
    put(compared(turns, shapes, dtype, read) | {"engines": loaded})
    return 0


def turn(answer: Figures) -> Figures:
    """The figures of one turn: the rate from the median step, the first ones left out."""
    step = statistics.median(answer["steps"][SKIP:] or answer["steps"])
    return {
        "decode": 1 / step,
        "first": answer["first"],
        "peak": answer["peak"],
        "ids": answer["ids"][:8],
    }


def compared(turns: dict[str, list[Figures]], shapes: Shapes, dtype: str, read: float) -> Figures:
    """Medians of each engine, ratios paired by round, and what part of the bandwidth decoding
    takes: bytes of the weights a token reads, over what this chip was seen to read."""
    per_weight = (shapes.bits + 0.5) / 8 if shapes.bits else ITEM[dtype]  # scale and bias of 64
    token_bytes = shapes.read_per_token() * per_weight
    keys = ("decode", "first", "peak")
    pairs = list(zip(turns["moescope"], turns["mlx-lm"], strict=True))
    rate = statistics.median(turn["decode"] for turn in turns["moescope"])
    return {
        "shapes": {"layers": shapes.layers, "bits": shapes.bits, "dtype": dtype},
        "bytes_per_token": int(token_bytes),
        "read_gb_s": read,
        "share": token_bytes * rate / 1e9 / read,
        "ratio": {
            key: statistics.median(a[key] / max(b[key], 1e-12) for a, b in pairs) for key in keys
        },
        **{
            name: {key: statistics.median(turn[key] for turn in found) for key in keys}
            for name, found in turns.items()
        },
        "same_tokens": all(a["ids"] == b["ids"] for a, b in pairs),
        "turns": turns,
    }


if __name__ == "__main__":
    sys.exit(main())
