"""An engine in a process of its own: a JSON line down, a JSON line up.

The parent asks (`{"do": "decode", ...}`), the child answers, and neither does anything in between,
so that engines can stay loaded while others are measured. What libraries print goes to standard
error. The child ends when its standard input closes.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
Figures = dict[str, Any]


class Unavailable(Exception):
    """A peer that is not installed, or cannot do what was asked; the message is one line."""


class Child:
    """The parent's end. `script` is a file of this folder."""

    def __init__(self, script: str, *arguments: str, threads: int, **env: str) -> None:
        settings = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "THP_MEM_ALLOC_ENABLE": "1",  # torch on huge pages: what moescope asks for itself
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            **env,
        }
        self.name = script.removesuffix(".py")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=settings,
        )

    def ask(self, do: str, **request: Any) -> Figures:
        """One request; raises `Unavailable` with the child's own words."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(f"{self.name} ended with code {self._process.wait()}")
        answer: Figures = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def serve(actions: Mapping[str, Callable[..., Figures]]) -> None:
    """The child's end: answer requests until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        except Exception as error:
            if os.environ.get("BENCH_DEBUG"):
                traceback.print_exc()
            first = (str(error).splitlines() or [""])[0][:200]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def greedy(
    prefill: Callable[[list[int]], int], step: Callable[[int], int], prompt: list[int], tokens: int
) -> Figures:
    """Seconds to the first token and of each that follows. Both callables return the likeliest
    next id, on the host, so that every engine is timed to the same point."""
    began = time.perf_counter()
    token = prefill(prompt)
    now = time.perf_counter()
    first, ids, steps = now - began, [token], []
    for _ in range(tokens - 1):
        token = step(token)
        then, now = now, time.perf_counter()
        steps.append(now - then)
        ids.append(token)
    return {"first": first, "steps": steps, "ids": ids}


def parts(prompt: list[int], steps: int) -> list[list[int]]:
    """A prompt whose last `steps` tokens stand alone."""
    cut = len(prompt) - steps
    return [prompt[:cut], *([token] for token in prompt[cut:])]


def packed(logits: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(logits, np.float32).tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), np.float32)
