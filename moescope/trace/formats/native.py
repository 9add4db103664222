"""`.moetrace` as one of the formats that `convert` knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moescope.trace.database import MAGIC
from moescope.trace.formats.source import Source
from moescope.trace.frames import Frame
from moescope.trace.store import TraceReader, TraceWriter


def detect(start: bytes) -> bool:
    return start.startswith(MAGIC)


def read(path: Path) -> Source:
    """A recorded trace; what is damaged in it ends up in the notes."""
    reader = TraceReader.open(path)

    def frames() -> Iterator[Frame]:
        with reader:
            yield from reader.frames()

    return Source(reader.meta, reader.placed_events(), frames(), reader.problems)


def write(path: Path, source: Source) -> int:
    """Write all frames, each event where it was; the number of frames."""
    events = list(source.events)
    count = 0
    with TraceWriter(path, source.meta, force=True) as writer:
        for frame in source.frames:
            while events and events[0][1] <= count:
                writer.event(events.pop(0)[0])
            writer.append(frame)
            count += 1
        for event, _ in events:
            writer.event(event)
    return count
