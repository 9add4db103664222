"""Questions that any trace answers alike, on disk or in memory: lanes, forks, columns of frames.

Works on the few things a trace offers (`keys`, `placed_events`); reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.trace.chunk import stacked
from moescope.trace.fields import ARRAYS, SCALARS
from moescope.trace.frames import Frame, TraceEvent

Field = tuple[str, str, float]  # dtype, letters, what fills unused slots
FIELDS: dict[str, Field] = {
    **{name: (dtype, letters, fill) for name, dtype, letters, fill in ARRAYS},
    **{name: (dtype, "", np.nan if "f" in dtype else -1) for name, dtype in SCALARS},
    "phase": ("|i1", "", -1),
}


class Keys(Protocol):
    """What a trace offers for finding frames."""

    def keys(self) -> NDArray[np.int64]: ...

    def placed_events(self) -> list[tuple[TraceEvent, int]]: ...


def pieces(events: Iterable[TraceEvent]) -> dict[int, str]:
    """Token id -> text, from the `pieces` events."""
    found: dict[int, str] = {}
    for event in events:
        if event.kind == "pieces":
            texts = event.data.get("pieces", {})
            for token_id, text in texts.items() if isinstance(texts, dict) else ():
                if token_id.isascii() and token_id.isdigit() and isinstance(text, str):
                    found[int(token_id)] = text
    return found


def dropped_logits(events: Iterable[TraceEvent]) -> int:
    """How many of the oldest frames lost their logits to a size limit, from the `note` events."""
    counts = [e.data.get("dropped_logits", 0) for e in events if e.kind == "note"]
    return max((count for count in counts if isinstance(count, int)), default=0)


def lane_frames(trace: Keys, lane: int, sequence: int | None = None) -> NDArray[np.int64]:
    """Indices of the frames of a lane in the order of positions, what a fork shares included.

    Of a position that came twice (a lane re-filled, a part run again) the newer frame counts.
    Without `sequence`, the newest that the lane has.
    """
    keys = trace.keys()
    newest: dict[int, int] = {}
    _collect(trace, keys, lane, sequence, len(keys), 2**62, newest, 0)
    return np.array([newest[position] for position in sorted(newest)], dtype=np.int64)


def _collect(
    trace: Keys,
    keys: NDArray[np.int64],
    lane: int,
    sequence: int | None,
    before: int,
    below: int,
    newest: dict[int, int],
    depth: int,
) -> None:
    mine = np.flatnonzero((keys[:before, 1] == lane) & (keys[:before, 2] < below))
    forks = [
        (event, at)
        for event, at in trace.placed_events()
        if event.kind == "fork" and event.lane == lane and at <= before
    ]
    fork = forks[-1] if forks else None
    if fork is not None:
        parent, position = fork[0].data.get("fork_of"), fork[0].position
        fresh = mine[mine >= fork[1]]
        if sequence is None and fresh.size:
            sequence = int(keys[fresh[-1], 0])
        if isinstance(parent, int) and parent != lane and depth < 64:
            shared = _sequence_at(keys, parent, fork[1])
            if sequence is None or shared is None or sequence == shared:
                _collect(
                    trace, keys, parent, shared, fork[1], min(position, below), newest, depth + 1
                )
                mine = fresh
    if sequence is None and mine.size:
        sequence = int(keys[mine[-1], 0])
    for index in mine[keys[mine, 0] == sequence] if sequence is not None else mine:
        newest[int(keys[index, 2])] = int(index)


def _sequence_at(keys: NDArray[np.int64], lane: int, before: int) -> int | None:
    """The sequence a lane was in when this many frames were there."""
    mine = np.flatnonzero(keys[:before, 1] == lane)
    return int(keys[mine[-1], 0]) if mine.size else None


def find(trace: Keys, lane: int, position: int, sequence: int | None = None) -> int | None:
    """The index of the frame of one position of a lane, or None."""
    indices = lane_frames(trace, lane, sequence)
    positions = trace.keys()[indices, 2]
    hits = indices[positions == position]
    return int(hits[-1]) if hits.size else None


def column_of_frames(name: str, frames: Sequence[Frame | None]) -> NDArray[Any] | None:
    """One field of frames as an array [n, ...]; None where no frame has it."""
    dtype, letters, fill = FIELDS[name]
    values = [None if frame is None else getattr(frame, name) for frame in frames]
    if not letters:
        return np.array([fill if v is None else v for v in values], dtype=dtype)
    shapes = [value.shape for value in values if value is not None]
    if not shapes:
        return None
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return stacked(values, len(frames), dtype, largest, fill)


def joined(name: str, parts: Sequence[tuple[int, NDArray[Any] | None]]) -> NDArray[Any]:
    """Parts of a column, each (rows, array or None), as one array padded to the largest shape."""
    dtype, letters, fill = FIELDS[name]
    known = [part for _, part in parts if part is not None]
    if len(known) == len(parts) == 1:
        return known[0].astype(dtype, copy=False)
    shapes = [part.shape[1:] for part in known]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)] if shapes else [0] * len(letters)
    whole = np.full((sum(rows for rows, _ in parts), *largest), fill, dtype=dtype)
    at = 0
    for rows, part in parts:
        if part is not None:
            whole[at : at + rows][(slice(None), *map(slice, part.shape[1:]))] = part
        at += rows
    return whole
