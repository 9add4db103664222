"""Flips whose cause a run recorded: why two gates chose otherwise, and which rows of a gate did it.

Read from events of kind `flips`, which a trace of two checkpoints on the same tokens holds
(`engine/crossed.py`). What a stranger's trace says is checked; what means nothing is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moescope.diagnosis.causes import CAUSES, UNKNOWN, Flip
from moescope.diagnosis.gate_rows import GateBlame, GateRows
from moescope.trace.frames import TraceEvent

LaneKey = tuple[int, int]  # (sequence, lane)


class Flips:
    """Of every lane, against the first. `layers` of the routers, `experts` of the widest."""

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._causes: dict[tuple[LaneKey, int], dict[int, str]] = {}
        self._blamed: dict[LaneKey, GateBlame] = {}

    def take(self, event: TraceEvent) -> None:
        sequence, told = event.data.get("sequence"), event.data.get("flips")
        if type(sequence) is not int or not isinstance(told, list) or len(told) > len(self._layers):
            return
        flips = [flip for item in told if (flip := self._flip(item)) is not None]
        key = sequence, event.lane
        if (key, event.position) in self._causes:
            return  # a lane that was filled again
        self._causes[key, event.position] = {flip.router: flip.cause for flip in flips}
        self._blamed.setdefault(key, GateBlame(self._layers)).take(flips)

    def _flip(self, item: Any) -> Flip | None:
        if not isinstance(item, list) or len(item) != 3:
            return None
        router, cause, rows = item
        if type(router) is not int or not 0 <= router < len(self._layers):
            return None
        if cause not in (*CAUSES, UNKNOWN):
            return None
        if rows is None:
            return Flip(router, cause)
        if not isinstance(rows, list) or not all(self._is_row(row) for row in rows):
            return None
        return Flip(router, cause, tuple((row[0], float(row[1])) for row in rows))

    def _is_row(self, row: Any) -> bool:
        if not isinstance(row, list) or len(row) != 2 or type(row[0]) is not int:
            return False
        error = row[1]
        return 0 <= row[0] < self._experts and type(error) in (int, float) and math.isfinite(error)

    def causes(self, sequence: int, lane: int, position: int) -> dict[int, str] | None:
        """Why routers of `lane` chose otherwise than the first lane's, by router; None: not told
        of this token."""
        return self._causes.get(((sequence, lane), position))

    def tells(self, sequence: int, lane: int) -> bool:
        """Whether anything was told of a lane."""
        return (sequence, lane) in self._blamed

    def rows(self, sequence: int, lane: int) -> GateRows | None:
        """Rows of the gate of `lane` by the flips they turned; None: nothing was told."""
        blamed = self._blamed.get((sequence, lane))
        return None if blamed is None else blamed.result()
