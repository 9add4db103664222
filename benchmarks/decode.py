"""Decode and first token against the peers, in interleaved rounds, beside the read bandwidth.

Engines stay loaded, one process each, and are asked by turns. Slow modes, and those that need too
much memory beside others, are `slow.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import measure
from asked import Asked
from child import Child, Unavailable, unpacked
from weights import GGUF

Figures = dict[str, Any]
TRANSFORMERS = ("eager", "grouped_mm", "grouped_mm static", "grouped_mm compiled")
STEPS = 4  # tokens of the prompt that are decoded where engines are compared
KEYS = ("tokens_per_s", "gb_s", "first_s")


def run(asked: Asked) -> Figures:
    with ExitStack() as stack:
        engines = Engines(asked, stack)
        engines.add("moescope", "engine_moescope.py", _moescope, folder=str(asked.model))
        engines.add(
            "pure torch", "engine_moescope.py", _pure, folder=str(asked.model), MOESCOPE_NATIVE="0"
        )
        engines.add(
            "transformers", "engine_transformers.py", _transformers, folder=str(asked.model)
        )
        engines.add("llama.cpp", "engine_llama.py", _llama, file=str(asked.model / GGUF))
        reader = stack.enter_context(Child("bandwidth.py", threads=asked.threads))
        reader.ask("load", threads=asked.threads, size=asked.read_bytes)
        parity = engines.parity()
        engines.warm()
        with measure.Meter() as idle:  # engines that wait must not be in the way of others
            time.sleep(1.0)
        contestants = {"read bandwidth": partial(_read, reader), **engines.contestants}
        turns = measure.rounds(contestants, asked)
    return {
        "engines_loaded": engines.loaded,
        "missing": engines.missing,
        "parity": parity,
        "cores_used_by_waiting_engines": round(idle.own, 3),
        "bytes_per_token": asked.shapes.token_bytes(),
        **compared(turns, list(engines.contestants)),
        "turns": turns,
    }


class Engines:
    """Children by name, what they say of themselves, and the contestants they offer."""

    def __init__(self, asked: Asked, stack: ExitStack) -> None:
        self.asked, self.stack = asked, stack
        self.children: dict[str, Child] = {}
        self.contestants: dict[str, Callable[[], Figures]] = {}
        self.loaded: dict[str, Figures] = {}
        self.missing: dict[str, str] = {}

    def add(
        self,
        name: str,
        script: str,
        offers: Callable[[Child, Asked], dict[str, Callable[[], Figures]]],
        *,
        folder: str | None = None,
        file: str | None = None,
        **env: str,
    ) -> None:
        measure.say(f"  loading {name}")
        child = self.stack.enter_context(Child(script, threads=self.asked.threads, **env))
        place = {"folder": folder} if folder is not None else {"file": file}
        try:
            self.loaded[name] = child.ask("load", **place, threads=self.asked.threads)
        except Unavailable as error:
            self.missing[name] = str(error)
            return
        self.children[name] = child
        self.contestants |= offers(child, self.asked)

    def parity(self) -> Figures:
        """Whether the engines do the same work: logits after the prompt, whose last tokens were
        fed as decoding feeds them, against moescope's."""
        request = {"prompt": self.asked.prompt_ids(), "steps": STEPS}
        logits = {
            name: unpacked(child.ask("logits", **request)["logits"])
            for name, child in self.children.items()
        }
        base = logits.pop("moescope")
        return {
            "scale": float(base.std()),
            **{
                name: {
                    "largest_difference": float(abs(row - base).max()),
                    "same_token": bool(row.argmax() == base.argmax()),
                }
                for name, row in logits.items()
            },
        }

    def warm(self) -> None:
        """Every contestant once, unmetered: compilation, first touches. One that fails is out."""
        for name in list(self.contestants):
            measure.say(f"  warming {name}")
            try:
                self.contestants[name]()
            except Unavailable as error:
                self.missing[name] = str(error)
                del self.contestants[name]


def turn(answer: Figures, asked: Asked, item: int = 2) -> Figures:
    """The figures of one turn: rates from the median step, the first ones left out."""
    seconds = statistics.median(answer["steps"][asked.skip :])
    return {
        "tokens_per_s": 1 / seconds,
        "gb_s": asked.shapes.token_bytes(item) / seconds / 1e9,
        "first_s": answer["first"],
        "slowest_step_s": max(answer["steps"][asked.skip :]),
        "ids": answer["ids"][:8],
    }


def compared(turns: list[Figures], names: list[str]) -> Figures:
    """Medians, and ratios paired by round: of moescope to each, and of each to the bandwidth."""
    found: Figures = {
        "read_gb_s": measure.medians(turns, "read bandwidth", ("gb_s",)),
        "engines": {name: measure.medians(turns, name, KEYS) for name in names},
    }
    found["share_of_read"] = {
        name: measure.ratios(turns, name, "read bandwidth", "gb_s") for name in names
    }
    for base in ("moescope", "moescope, pure torch"):
        if base in names:
            found[f"decode: {base} over"] = {
                name: measure.ratios(turns, base, name, "tokens_per_s")
                for name in names
                if name != base
            }
            found[f"first token: {base} over"] = {
                name: measure.ratios(turns, base, name, "first_s") for name in names if name != base
            }
    return found


def _read(reader: Child) -> Figures:
    return reader.ask("read", repeats=5)


def _asks(child: Child, asked: Asked, do: str = "decode", **more: Any) -> Callable[[], Figures]:
    request = {"prompt": asked.prompt_ids(), "tokens": asked.tokens, **more}
    return lambda: turn(child.ask(do, **request), asked)


def _moescope(child: Child, asked: Asked) -> dict[str, Callable[[], Figures]]:
    return {
        "moescope": _asks(child, asked, record="weights"),
        "moescope, bare loop": _asks(child, asked, "bare"),
    }


def _pure(child: Child, asked: Asked) -> dict[str, Callable[[], Figures]]:
    return {"moescope, pure torch": _asks(child, asked, record="weights")}


def _transformers(child: Child, asked: Asked) -> dict[str, Callable[[], Figures]]:
    return {f"transformers {mode}": _asks(child, asked, mode=mode) for mode in TRANSFORMERS}


def _llama(child: Child, asked: Asked) -> dict[str, Callable[[], Figures]]:
    modes = {"llama.cpp": "flash attention", "llama.cpp, no flash attention": "no flash attention"}
    return {name: _asks(child, asked, mode=mode) for name, mode in modes.items()}
