"""Start-up: seconds from starting a process to what it was started for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from asked import Asked
from child import Unavailable
from terminal import Terminal

from moescope.demo import CHECKPOINT

Figures = dict[str, Any]
FIRST_FRAME = b"moescope"  # the name in the top line
PROGRAM = str(Path(sys.executable).parent / "moescope")
_TRANSFORMERS = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
"""
COMMANDS = {
    "python, nothing": [sys.executable, "-c", "pass"],
    "python, import torch": [sys.executable, "-c", "import torch"],
    "moescope --version": [PROGRAM, "--version"],
    "moescope, one token of the demo": [
        *(PROGRAM, "generate", "demo", "--prompt-ids", "1,2,3", "--max-new-tokens", "1"),
    ],
    "transformers, one token of the demo": [sys.executable, "-c", _TRANSFORMERS],
}


def run(asked: Asked) -> Figures:
    contestants: dict[str, Callable[[], Figures]] = {
        name: (lambda command=command: _ended(command, asked.threads))
        for name, command in COMMANDS.items()
    }
    contestants["moescope, first frame"] = _first_frame
    missing = {}
    for name in list(contestants):
        try:
            contestants[name]()  # files into the system's cache
        except (Unavailable, TimeoutError, OSError) as error:
            missing[name] = str(error)
            del contestants[name]
    turns = measure.rounds(contestants, asked)
    return {
        "missing": missing,
        "starts": {name: measure.medians(turns, name, ("start_s",)) for name in contestants},
    }


def _ended(command: list[str], threads: int) -> Figures:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise Unavailable(done.stderr.decode(errors="replace").strip().splitlines()[-1][:200])
    return {"start_s": seconds}


def _first_frame() -> Figures:
    screen = Terminal([PROGRAM])
    try:
        return {"start_s": screen.wait_for(FIRST_FRAME)}
    finally:
        screen.end()
