"""What a format hands to another: a trace as meta, events and a stream of frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moescope.trace.frames import Frame, TraceEvent, TraceMeta


@dataclass(slots=True)
class Source:
    """A trace on its way through `convert`. Whoever reads `frames` to the end fills the notes."""

    meta: TraceMeta
    events: list[tuple[TraceEvent, int]]  # each with the number of frames before it
    frames: Iterator[Frame]
    notes: list[str] = field(default_factory=list)  # what was skipped, what is missing
