"""How verbs read a trace: whatever is damaged in it is said on standard error, here and nowhere
else, so that no verb takes what cannot be read for what was not recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.commands import running

SHOWN = 4  # problems of one trace
LOOKED_THROUGH = 64 << 20  # bytes of a trace that a screen may wait for


@contextmanager
def opened(path: Path, from_: str | None = None) -> Iterator[Any]:
    """A trace of any format, read through once, closed at the end; see `formats.open_trace`.

    Raises `MoescopeError` (TRACE) where nothing in it can be read."""
    from moescope.trace.formats import open_trace
    from moescope.trace.metadata import trace_error

    trace = open_trace(path, from_)
    try:
        if not trace.count and not trace.complete:
            raise trace_error(path, "the recording was ended before its first token")
        tell(path.name, trace.problems)
        yield trace
    finally:
        trace.close()


def look_through(path: Path) -> None:
    """Say what is damaged in a trace that the screen is about to open, unless it is so large that
    the screen would be late. Raises as `opened`."""
    from moescope.trace.lock import writer_of

    large = path.is_file() and path.stat().st_size > LOOKED_THROUGH
    if not large and writer_of(path) is None:  # what is being recorded now grows
        with opened(path, "moetrace"):
            pass


def tell(name: str, problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN]:
        running.talk(f"{name}: {problem}")
    if len(problems) > SHOWN:
        running.talk(f"{name}: and {len(problems) - SHOWN} more")
