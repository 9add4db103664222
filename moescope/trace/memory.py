"""`MemoryTrace`: a trace that is in no file, with the reading side of `TraceReader`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace import lanes
from moescope.trace.frames import Frame, TraceEvent, TraceMeta


class MemoryTrace:
    """Frames and events in lists; the same questions as `TraceReader`, and `append` and `event`."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.problems: list[str] = []
        self.complete = True
        self._frames: list[Frame] = []
        self._events: list[tuple[TraceEvent, int]] = []

    def append(self, frame: Frame) -> None:
        self._frames.append(frame)

    def extend(self, frames: Iterable[tuple[Frame, Any]]) -> None:
        for frame, _ in frames:
            self.append(frame)

    def event(self, event: TraceEvent) -> None:
        self._events.append((event, len(self._frames)))

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing is open here."""

    def refresh(self) -> bool:
        return False

    @property
    def acknowledged(self) -> int:
        return len(self._frames)

    @property
    def count(self) -> int:
        return len(self._frames)

    @property
    def lanes(self) -> tuple[int, ...]:
        return tuple(sorted({frame.lane for frame in self._frames}))

    @property
    def dropped_logits(self) -> int:
        return lanes.dropped_logits(self.events())

    def frame(self, index: int) -> Frame:
        if not 0 <= index < len(self._frames):
            raise IndexError(index)
        return self._frames[index]

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        yield from self._frames[max(start, 0) : stop]

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Frame]]:
        return enumerate(self.frames(start, stop), start=max(start, 0))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        frames = self._frames[max(start, 0) : stop]
        return lanes.joined(name, [(len(frames), lanes.column_of_frames(name, frames))])

    def events(self) -> list[TraceEvent]:
        return [event for event, _ in self._events]

    def placed_events(self) -> list[tuple[TraceEvent, int]]:
        return self._events

    def pieces(self) -> dict[int, str]:
        return lanes.pieces(self.events())

    def keys(self) -> NDArray[np.int64]:
        keys = [(frame.sequence, frame.lane, frame.position) for frame in self._frames]
        return np.array(keys, dtype=np.int64).reshape(-1, 3)

    def find(self, lane: int, position: int, sequence: int | None = None) -> int | None:
        return lanes.find(self, lane, position, sequence)

    def lane_frames(self, lane: int, sequence: int | None = None) -> NDArray[np.int64]:
        return lanes.lane_frames(self, lane, sequence)
