"""What a run was asked for: shapes, sizes, folders. Every result says it, so that runs compare."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapes import Shapes


@dataclass(frozen=True, slots=True)
class Asked:
    model: Path  # the folder with the weights
    shapes: Shapes = field(default_factory=Shapes)
    threads: int = os.cpu_count() or 1
    prompt: int = 128  # tokens
    tokens: int = 64  # decoded per turn
    skip: int = 4  # first steps of a turn that are not counted
    rounds: int = 5
    retries: int = 2  # of a noisy turn
    settle: float = 0.3  # seconds before a turn, for the threads of the one before it to sleep
    read_bytes: int = 1 << 30  # what the read bandwidth is measured on

    def prompt_ids(self) -> list[int]:
        import numpy as np

        ids = np.random.default_rng(128).integers(0, self.shapes.vocab, self.prompt)
        return [int(token) for token in ids]

    def figures(self) -> dict[str, Any]:
        """For results: everything but where the folder is."""
        return {
            "model": f"OLMoE-1B-7B shapes, {self.shapes.layers} of 16 layers, bfloat16, random",
            **{name: value for name, value in asdict(self).items() if name != "model"},
        }


def quick(model: Path) -> Asked:
    """A trial run of seconds: figures mean nothing, everything is gone through once."""
    return Asked(
        model,
        Shapes(layers=1),
        prompt=16,
        tokens=10,
        skip=2,
        rounds=1,
        retries=0,
        settle=0.1,
        read_bytes=1 << 27,
    )
