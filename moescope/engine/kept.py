"""What routers decided for a batch of tokens, in one block of memory laid out as a trace keeps it.

A decode step fills it, frames are views of it, and a record of a token is two runs of its bytes:
nothing is copied array by array. The fields and their order are those of `trace.fields.ARRAYS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.frames import RecordLevel

LEVELS: tuple[RecordLevel, ...] = ("ids", "weights", "logits")
_SCALARS = ("score_sum", "mass", "entropy", "margin")
_PICKS = ("weights", "scores")


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """`floats` [N, T, F] float32 and `ints` [N, T, L (K + 1)] int16, F = 4 L + 2 L K + L E as far
    as `level` goes. N lanes, T tokens, L routers, K picks, E expert classes."""

    floats: NDArray[np.float32]
    ints: NDArray[np.int16]
    L: int
    K: int
    E: int
    level: RecordLevel

    @staticmethod
    def empty(shape: tuple[int, int], L: int, K: int, E: int, level: RecordLevel) -> Kept:
        wide = LEVELS.index(level)
        each = 4 + 2 * K * (wide > 0) + E * (wide > 1)
        floats = np.empty((*shape, L * each), np.float32)
        return Kept(floats, np.empty((*shape, L * (K + 1)), np.int16), L, K, E, level)

    def addresses(self) -> tuple[int, int]:
        """Of the floats and of the ints."""
        return self.floats.ctypes.data, self.ints.ctypes.data

    def fields(self) -> dict[str, Any]:
        """Views by the names of `StepOutput`; None for what the level leaves out."""
        L, K, shape = self.L, self.K, self.floats.shape[:2]
        picks = self.ints[..., : L * K].reshape(*shape, L, K)
        found: dict[str, Any] = {"expert_ids": picks, "runner_up": self.ints[..., L * K :]}
        at = 0
        for name in _SCALARS:
            found[name] = self.floats[..., at : at + L]
            at += L
        for name in _PICKS:
            end = at + L * K
            held = self.level != "ids"
            found[name] = self.floats[..., at:end].reshape(*shape, L, K) if held else None
            at = end
        held = self.level == "logits"
        found["router_logits"] = self.floats[..., at:].reshape(*shape, L, self.E) if held else None
        return found

    def record(self, row: int, column: int) -> tuple[bytes, bytes]:
        """Ints and floats of one token, as they stand in a trace."""
        return self.ints[row, column].tobytes(), self.floats[row, column].tobytes()
