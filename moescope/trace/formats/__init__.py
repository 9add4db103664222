"""Traces in other forms: `convert` between any two of the formats in the table `FORMATS`.

A format is recognised by its content. A target is written under a temporary name and renamed when
it is complete and on the disk, so that a file under its own name is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.database import wal_path
from moescope.trace.formats import csvform, jsonl, native, parquet
from moescope.trace.formats.source import Source
from moescope.trace.frames import Frame
from moescope.trace.memory import MemoryTrace
from moescope.trace.metadata import nothing_readable, trace_error
from moescope.trace.store import TraceReader

START_BYTES = 1 << 16  # enough of a file to see what it is


@dataclass(frozen=True, slots=True)
class Format:
    """How a format is known, read and written. `write` returns the number of rows."""

    title: str
    detect: Callable[[bytes], bool]
    read: Callable[[Path], Source]
    write: Callable[[Path, Source], int]


FORMATS: dict[str, Format] = {
    "moetrace": Format("moescope's own trace", native.detect, native.read, native.write),
    "parquet": Format("long form, Parquet", parquet.detect, parquet.read, parquet.write),
    "csv": Format("long form, CSV", csvform.detect, csvform.read, csvform.write),
    "jsonl": Format("long form, JSON lines", jsonl.detect, jsonl.read, jsonl.write),
}


def convert(
    source: str | Path,
    target: str | Path,
    from_: str | None = None,
    to: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Turn the trace in `source` into `target`; what was done, for people and for JSON.

    Raises `MoescopeError`: TRACE for a bad source, OUTPUT where the target exists (without `force`)
    or cannot be written, USAGE where the formats are not told. A target is never left half written.
    """
    source, target = Path(source), Path(target)
    reading = from_ or detect(source)
    writing = to or _by_name(target)
    for name in (reading, writing):
        if name not in FORMATS:
            raise MoescopeError(f"format {single_line(name, 40)}: expected {_names()}")
    _check_place(source, target, force)
    trace = FORMATS[reading].read(source)
    counted = _Counted(trace.frames)
    with written_whole(target) as temporary:
        rows = FORMATS[writing].write(temporary, replace(trace, frames=iter(counted)))
        if trace.notes and not counted.count:
            raise nothing_readable(source, trace.notes)
    summary = {
        "from": reading,
        "to": writing,
        "frames": counted.count,
        "lanes": len(counted.lanes),
        "events": len(trace.events),
        "rows": rows,
        "bytes": target.stat().st_size,
    }
    return summary | ({"notes": trace.notes} if trace.notes else {})


def open_trace(path: str | Path, from_: str | None = None) -> TraceReader | MemoryTrace:
    """A trace of any format, to be asked questions: our own stays on the disk, others are held in
    memory. All of it was read once: what is damaged is in `problems`, and left out of every answer.
    Raises `MoescopeError` (TRACE) for whatever else is wrong, and where nothing can be read."""
    path = Path(path)
    name = from_ or detect(path)
    if name == "moetrace":
        reader = TraceReader.open(path)
        try:
            reader.verify()
        except BaseException:
            reader.close()
            raise
        return reader
    source = FORMATS[name].read(path)
    trace = MemoryTrace(source.meta)
    events = list(reversed(source.events))
    for frame in source.frames:
        while events and events[-1][1] <= trace.count:
            trace.event(events.pop()[0])
        trace.append(frame)
    while events:
        trace.event(events.pop()[0])
    trace.problems += source.notes
    return trace


class _Counted:
    """Frames, counted while they pass."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self.count = 0
        self.lanes: set[int] = set()

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            self.count += 1
            self.lanes.add(frame.lane)
            yield frame


def detect(path: Path) -> str:
    """The format of a file, by its content. Raises `MoescopeError` (TRACE) where none fits."""
    if wal_path(path).exists():
        # Being recorded: to open and close it here would take away SQLite's locks in this process.
        return "moetrace"
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise trace_error(path, (error.strerror or "cannot be read").lower()) from error
    fitting = [name for name, known in FORMATS.items() if known.detect(start)]
    if len(fitting) == 1:
        return fitting[0]
    found = " or ".join(fitting) or "none of them"
    raise trace_error(path, f"format: expected {_names()}, found {found}", "--from FORMAT")


def _by_name(target: Path) -> str:
    name = target.suffix.removeprefix(".").lower()
    if name in FORMATS:
        return name
    shown = single_line(target.name, 120)
    raise MoescopeError(f"{shown}: expected a name that ends in {_names('.')}", hint="--to FORMAT")


def _names(dot: str = "") -> str:
    return ", ".join(dot + name for name in FORMATS)


def _check_place(source: Path, target: Path, force: bool) -> None:
    shown = single_line(str(target))
    if target.is_dir():
        raise MoescopeError(f"{shown}: is a folder", code=ExitCode.OUTPUT)
    if target.exists():
        if source.exists() and target.samefile(source):
            raise MoescopeError(f"{shown}: is the source itself", code=ExitCode.OUTPUT)
        if not force:
            raise MoescopeError(
                f"{shown}: already exists",
                hint="give another name, or --force to replace it",
                code=ExitCode.OUTPUT,
            )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` to write to; it takes its place when all went well.

    Raises `MoescopeError` (OUTPUT) where the disk or the folder does not let it; then the target is
    what it was before.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise _export_failed(target, (error.strerror or str(error)).lower()) from error
    except MoescopeError as error:
        if error.code != ExitCode.OUTPUT:
            raise
        reason = error.message.partition(": ")[2].partition(": recording stopped")[0]
        raise _export_failed(target, reason) from error
    finally:
        with suppress(OSError):  # a folder that takes no file has none to lose
            for suffix in ("", "-wal", "-shm", "-journal"):
                temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _export_failed(target: Path, reason: str) -> MoescopeError:
    return MoescopeError(
        f"{single_line(str(target))}: export failed: {single_line(reason, 120)}; no file written",
        code=ExitCode.OUTPUT,
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
