"""`TraceReader`: reads a `.moetrace`, somebody else's or the one being recorded now.

Frames are counted in the order they were appended. Chunks are read when they are needed, one column
at a time where that is enough; one that is damaged is skipped and named in `problems`, and the
others stay readable. How the file is opened and guarded is in `database.py`.
"""

from __future__ import annotations

import sqlite3
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MoescopeError
from moescope.safety import LIMITS, single_line
from moescope.trace import checks, database, lanes, lock
from moescope.trace.chunk import ChunkStrings, columns_of, frames_of
from moescope.trace.columns import ColumnError, checksum, unpack
from moescope.trace.fields import ARRAYS, FLAGS, SCALARS, SHADOW, SHADOW_FIELDS, Columns, parse_json
from moescope.trace.frames import Frame, TraceEvent, TraceMeta
from moescope.trace.metadata import (
    classes_by_router_count,
    event_from_json,
    from_json,
    trace_error,
)
from moescope.trace.record import frame_of
from moescope.trace.writer import CHUNK_FRAMES, meta_checksum

CACHE_BYTES = 96 << 20  # of expanded chunks
TAIL_LIMIT = 4 * CHUNK_FRAMES
EVENT_LIMIT = 1_000_000
JSON_LIMIT = 16 << 20
BASE = ("flags", "shape", "strings", "variant", *(name for name, _ in SCALARS))
ALTERNATIVES = ("alternatives", "alternatives.ids", "alternatives.logprobs")
ALWAYS = tuple(name for name, *_ in ARRAYS if name not in FLAGS)


@dataclass(slots=True, eq=False)
class _Chunk:
    """`count` frames from `first` on, as far as they were read."""

    first: int
    count: int
    fault: str = ""
    columns: Columns | None = None
    strings: ChunkStrings | None = None
    whole: bool = False  # every column that exists was read and checked

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in (self.columns or {}).values())


class TraceReader:
    """One open trace. Safe to use from several threads; `refresh` shows what came since."""

    def __init__(self, path: Path, *, live: bool, foreign: bool) -> None:
        self.path = path
        self.problems: list[str] = []  # one sentence each: what is damaged, and what was skipped
        self.complete = False  # the recording was ended properly
        self._live, self._foreign = live, foreign
        self._guard = threading.RLock()
        self._chunks: list[_Chunk] = []
        self._firsts: list[int] = []
        self._tail: list[Frame | None] = []
        self._tail_first = 0
        self._cache: OrderedDict[int, _Chunk] = OrderedDict()
        self._events: list[tuple[TraceEvent, int]] = []
        self._next_event = 0
        self._keys = np.empty((0, 3), dtype=np.int64)
        self._db, self._deadline = self._connect()
        self.meta = TraceMeta()

    @classmethod
    def open(cls, path: str | Path, *, live: bool = False, foreign: bool = True) -> TraceReader:
        """Open a trace. `live`: our own, being recorded now. `foreign`: check every value.

        Raises `MoescopeError` (TRACE) with a sentence for whatever is wrong with the file.
        """
        reader = cls(Path(path), live=live, foreign=foreign and not live)
        try:
            with reader._query():
                reader._read_meta()
            reader.refresh()
        except BaseException:
            reader.close()
            raise
        return reader

    def close(self) -> None:
        """Close the file; the last to read a recording that ended tidies up its WAL."""
        with self._guard:
            self._db.close()
            if self._live and self.complete:
                _fold(self.path)

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    # --- what a trace can be asked ----------------------------------------------------------------

    @property
    def count(self) -> int:
        """Frames, the damaged ones included."""
        return self._tail_first + len(self._tail)

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes that have frames."""
        return tuple(sorted({int(lane) for lane in self.keys()[:, 1] if lane >= 0}))

    def frame(self, index: int) -> Frame:
        """One frame. Raises IndexError beyond the end, `MoescopeError` where it is damaged."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        for frame in self.frames(index, index + 1):
            return frame
        raise trace_error(self.path, f"frame {index} cannot be read")

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames `start` to `stop`, without the damaged ones."""
        stop = self.count if stop is None else min(stop, self.count)
        at = max(start, 0)
        while at < stop:
            with self._guard:
                batch, at = self._batch(at, stop)
            yield from batch

    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """One field of frames `start` to `stop` as an array [n, ...], one row a frame.

        Padded to the largest shape among them; what was not recorded, or cannot be read, holds NaN
        or -1 (0 for weights and scores). Fields: the arrays and the plain numbers of `Frame`.
        """
        stop = self.count if stop is None else min(stop, self.count)
        parts: list[tuple[int, NDArray[Any] | None]] = []
        at = max(start, 0)
        while at < stop:
            with self._guard:
                rows, end = self._column_part(name, at, stop)
            parts.append((end - at, rows))
            at = end
        return lanes.joined(name, parts)

    def events(self) -> list[TraceEvent]:
        """Everything that happened beside the tokens, in order."""
        return [event for event, _ in self._events]

    def placed_events(self) -> list[tuple[TraceEvent, int]]:
        """Events, each with the number of frames appended before it."""
        return list(self._events)

    def pieces(self) -> dict[int, str]:
        """The text of every token id that a `pieces` event names."""
        return lanes.pieces(self.events())

    def keys(self) -> NDArray[np.int64]:
        """[count, 3]: sequence, lane and position of every frame; -1 where it cannot be read."""
        with self._guard:
            known = len(self._keys)
            if known < self.count:
                names = ("sequence", "lane", "position")
                new = np.stack([self.column(n, known).astype(np.int64) for n in names], axis=1)
                self._keys = np.concatenate([self._keys, new])
            return self._keys[: self.count]

    def find(self, lane: int, position: int, sequence: int | None = None) -> int | None:
        """The frame of this position in this lane (the shared part of a fork included)."""
        return lanes.find(self, lane, position, sequence)

    def lane_frames(self, lane: int, sequence: int | None = None) -> NDArray[np.int64]:
        """Indices of the frames a lane consists of, in the order of positions; what a forked lane
        shares is found in the lane it came from. Without `sequence`: the newest."""
        return lanes.lane_frames(self, lane, sequence)

    @property
    def dropped_logits(self) -> int:
        """Frames, the oldest, whose logits were dropped to stay within a size limit."""
        return lanes.dropped_logits(self.events())

    def refresh(self) -> bool:
        """Look for frames and events that came since. True where there are any."""
        before = (self.count, len(self._events), self.complete)
        with self._query():
            self._db.execute("BEGIN")  # chunks, tail and events of one moment
            try:
                if self._live and not self.complete:
                    self._read_closed()
                self._read_chunks()
                self._read_tail()
                self._read_events()
            finally:
                self._db.execute("ROLLBACK")
        if self.complete and not before[2]:
            self._compare_with_closed()
            if self._live:
                self._reconnect()
        return before != (self.count, len(self._events), self.complete)

    # --- opening ----------------------------------------------------------------------------------

    def _connect(self) -> tuple[sqlite3.Connection, database.Deadline]:
        try:
            wal = database.wal_path(self.path).exists()
            if not self.path.is_file():
                raise trace_error(self.path, "expected a file, found none")
            joined = False if wal or self._live else database.check_header(self.path)
            connection = database.open_reading(self.path, immutable=not wal and not self._live)
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise trace_error(self.path, reason) from error
        self._without_wal = joined
        return connection

    def _reconnect(self) -> None:
        """Let go of the WAL of a recording that ended, so that its writer can make one file."""
        with self._guard:
            self._db.close()
            self._db, self._deadline = self._connect()

    @contextmanager
    def _query(self) -> Iterator[None]:
        """Under the guard and a fresh deadline, with SQLite's errors as sentences."""
        with self._guard:
            self._deadline.restart()
            try:
                yield
            except sqlite3.Error as error:
                raise self._damaged(error) from error

    def _damaged(self, error: sqlite3.Error) -> MoescopeError:
        if "interrupted" in str(error):
            return trace_error(self.path, "reading takes longer than any trace of moescope does")
        return trace_error(self.path, f"the file is damaged ({single_line(str(error), 120)})")

    def _read_meta(self) -> None:
        rows: dict[str, Any] = {}
        for key, value in self._db.execute("SELECT k, v FROM meta"):
            if not isinstance(key, str) or len(rows) > 8 * LIMITS.layers:
                raise trace_error(self.path, "meta: expected names, found something else")
            rows[key] = value
        stored = rows.pop("crc", None)
        if not rows and stored is None:
            raise trace_error(self.path, *database.COPIED_WITHOUT_WAL)
        kinds = all(isinstance(value, (str, bytes)) for value in rows.values())
        if not kinds or stored != meta_checksum(rows):
            raise trace_error(self.path, "meta: checksum differs: the file is damaged")
        self.meta = from_json(self._json(rows.get("meta"), "meta"), self.path)
        self._rows = rows
        self._classes = classes_by_router_count(self.meta)
        self.meta.router_tensors.update(self._tensors(rows))
        self._closed = self._json(rows["closed"], "closed") if "closed" in rows else None
        self.complete = self._closed is not None
        if self._without_wal and not self.complete:
            self.problems.append(
                f"{database.COPIED_WITHOUT_WAL[0]}: the newest tokens are not in it"
            )

    def _read_closed(self) -> None:
        row = self._db.execute("SELECT v FROM meta WHERE k = 'closed'").fetchone()
        if row is not None:
            self._closed = self._json(row[0], "closed")
            self.complete = True

    def _json(self, value: Any, what: str) -> Any:
        if not isinstance(value, str) or len(value) > JSON_LIMIT:
            raise trace_error(self.path, f"{what}: expected text, found {type(value).__name__}")
        try:
            return parse_json(value.encode("utf-8", "surrogatepass"))
        except ColumnError as error:
            raise trace_error(self.path, f"{what} {error}") from error

    def _tensors(self, rows: dict[str, Any]) -> dict[int, dict[str, Any]]:
        tensors: dict[int, dict[str, Any]] = {}
        for key, value in rows.items():
            kind, _, rest = key.partition("/")
            if kind != "tensor":
                continue
            router, _, name = rest.partition("/")
            try:
                index = int(router)
                array = unpack(value)
            except ValueError as error:
                raise trace_error(self.path, f"{single_line(key, 80)}: {error}") from error
            tensors.setdefault(index, {})[name] = array
        return tensors

    def _compare_with_closed(self) -> None:
        closed = self._closed if isinstance(self._closed, dict) else {}
        for what, found in (("frames", self.count), ("events", len(self._events))):
            if closed.get(what) != found:
                wanted = single_line(str(closed.get(what)), 20)
                self.problems.append(f"{wanted} {what} were recorded, {found} can be read")

    # --- the index --------------------------------------------------------------------------------

    def _read_chunks(self) -> None:
        end = self._chunks[-1].first + self._chunks[-1].count if self._chunks else 0
        query = "SELECT first, n FROM chunk WHERE name = 'flags' AND first >= ? ORDER BY first"
        for first, count in self._db.execute(query, (end,)):
            fits = isinstance(first, int) and isinstance(count, int) and first >= end
            if not fits or not 1 <= count <= CHUNK_FRAMES or first > LIMITS.import_rows:
                self.problems.append("a chunk with an impossible place was skipped")
                continue
            if first > end:
                self._add_chunk(_Chunk(end, first - end))
                self._skip(self._chunks[-1], "is missing")
            self._add_chunk(_Chunk(first, count))
            end = first + count
        if end > self._tail_first:
            self._tail = self._tail[end - self._tail_first :]
            self._tail_first = end

    def _add_chunk(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self._firsts.append(chunk.first)

    def _read_tail(self) -> None:
        query = "SELECT i, crc, b FROM tail WHERE i >= ? ORDER BY i"
        for i, crc, blob in self._db.execute(query, (self.count,)):
            if not isinstance(i, int) or i - self._tail_first > TAIL_LIMIT:
                self.problems.append("tail: a row with an impossible place was skipped")
                break
            if i > self.count:
                self.problems.append(f"frames {self.count} to {i - 1} are missing")
                self._tail += [None] * (i - self.count)
            self._tail.append(self._tail_frame(i, crc, blob))

    def _tail_frame(self, i: int, crc: Any, blob: Any) -> Frame | None:
        try:
            if not isinstance(blob, bytes) or crc != checksum("tail", i, 1, blob):
                raise ColumnError("checksum differs")
            frame = frame_of(blob)
            if self._foreign:
                columns = columns_of([frame])
                self._check(_Chunk(i, 1, columns=columns), columns)
            return frame
        except ColumnError as error:
            self.problems.append(f"frame {i}: {error}; skipped")
            return None

    def _read_events(self) -> None:
        query = "SELECT i, kind, json, crc FROM event WHERE i >= ? ORDER BY i"
        for i, kind, text, crc in self._db.execute(query, (self._next_event,)):
            if not isinstance(i, int) or len(self._events) > EVENT_LIMIT:
                raise trace_error(self.path, "events: expected numbers, found something else")
            self._next_event = i + 1
            if not (isinstance(kind, str) and isinstance(text, str)):
                self.problems.append(f"event {i}: expected text; skipped")
                continue
            stored = text.encode("utf-8", "surrogatepass")
            if crc != checksum(f"event/{kind}", i, 1, stored):
                self.problems.append(f"event {i}: checksum differs; skipped")
                continue
            try:
                self._events.append(event_from_json(kind, self._json(text, "event"), self.path))
            except MoescopeError as error:
                self.problems.append(f"event {i}: {error.message}; skipped")

    # --- chunks -----------------------------------------------------------------------------------

    def _chunk_at(self, index: int) -> _Chunk:
        return self._chunks[bisect_right(self._firsts, index) - 1]

    def _batch(self, at: int, stop: int) -> tuple[list[Frame], int]:
        """The readable frames from `at` to the end of its chunk, and that end."""
        if at >= self._tail_first:
            low, high = at - self._tail_first, stop - self._tail_first
            return [frame for frame in self._tail[low:high] if frame is not None], stop
        chunk = self._chunk_at(at)
        end = min(chunk.first + chunk.count, stop)
        if not self._load(chunk):
            return [], end
        assert chunk.columns is not None and chunk.strings is not None
        low = at - chunk.first
        return frames_of(chunk.columns, chunk.strings, low, end - chunk.first), end

    def _column_part(self, name: str, at: int, stop: int) -> tuple[NDArray[Any] | None, int]:
        if at >= self._tail_first:
            low, high = at - self._tail_first, stop - self._tail_first
            return lanes.column_of_frames(name, self._tail[low:high]), stop
        chunk = self._chunk_at(at)
        end = min(chunk.first + chunk.count, stop)
        column = self._load_column(chunk, name)
        return (None if column is None else column[at - chunk.first : end - chunk.first]), end

    def _load_column(self, chunk: _Chunk, name: str) -> NDArray[Any] | None:
        """One checked column, None where it is not there. Only small ones stay in memory."""
        if chunk.fault:
            return None
        if chunk.columns is not None and (chunk.whole or name in chunk.columns):
            return chunk.columns.get(name)
        try:
            with self._query():
                columns = self._fetch(chunk, ("flags", "shape", name))
            self._check(chunk, columns)
            return columns.get(name)
        except (ColumnError, MoescopeError) as error:
            self._skip(chunk, str(error))
            return None

    def _load(self, chunk: _Chunk) -> bool:
        """All columns of a chunk, checked and cached. False where it is damaged."""
        if chunk.fault:
            return False
        if not chunk.whole:
            try:
                with self._query():
                    columns = self._fetch(chunk, (*BASE, *FIELD_NAMES, *ALTERNATIVES))
                    strings = ChunkStrings(columns["strings"], chunk.count)
                    columns |= self._fetch(chunk, _shadow_columns(strings))
                self._check_whole(chunk, columns, strings)
            except (ColumnError, MoescopeError) as error:
                self._skip(chunk, str(error))
                return False
            chunk.columns, chunk.strings, chunk.whole = columns, strings, True
            for column in columns.values():
                column.flags.writeable = False
        self._remember(chunk)
        return True

    def _remember(self, chunk: _Chunk) -> None:
        self._cache[chunk.first] = chunk
        self._cache.move_to_end(chunk.first)
        while len(self._cache) > 2 and sum(c.nbytes for c in self._cache.values()) > CACHE_BYTES:
            _, old = self._cache.popitem(last=False)
            old.columns, old.strings, old.whole = None, None, False

    def _fetch(self, chunk: _Chunk, names: tuple[str, ...]) -> Columns:
        marks = ",".join("?" * len(names))
        query = f"SELECT name, n, crc, b FROM chunk WHERE first = ? AND name IN ({marks})"
        columns: Columns = {}
        for name, count, crc, blob in self._db.execute(query, (chunk.first, *names)):
            if not isinstance(blob, bytes) or name not in names or count != chunk.count:
                raise ColumnError("holds another kind of value")
            if crc != checksum(name, chunk.first, count, blob):
                raise ColumnError("checksum differs")
            try:
                columns[name] = unpack(blob)
            except ColumnError as error:
                raise ColumnError(f"{name} {error}") from error
        for name in ("flags", "shape", *BASE, *ALWAYS):
            if name in names and name not in columns:
                raise ColumnError(f"{name} is missing")
        return columns

    def _check(self, chunk: _Chunk, columns: Columns) -> None:
        """Raise `ColumnError` for the first column that cannot be true."""
        shape = columns["shape"]
        if shape.shape != (chunk.count, 3):
            raise ColumnError("shape: expected one row a frame")
        get = self._getter(chunk, columns)
        for name, column in list(columns.items()):
            fault = checks.structure_fault(name, column, chunk.count, shape)
            if fault is None and self._foreign:
                fault = checks.value_fault(name, column, get, self._classes, self.meta.absent)
            if fault is not None:
                raise ColumnError(fault)

    def _getter(self, chunk: _Chunk, columns: Columns) -> Callable[[str], NDArray[Any]]:
        def get(name: str) -> NDArray[Any]:
            if name not in columns:
                with self._query():
                    columns.update(self._fetch(chunk, (name,)))
                if name not in columns:
                    raise ColumnError(f"{name} is missing")
                fault = checks.structure_fault(name, columns[name], chunk.count, columns["shape"])
                if fault is not None:
                    raise ColumnError(fault)
            return columns[name]

        return get

    def _check_whole(self, chunk: _Chunk, columns: Columns, strings: ChunkStrings) -> None:
        self._check(chunk, columns)
        flags = int(np.bitwise_or.reduce(columns["flags"]))
        if int(columns["variant"].max()) >= len(strings.variants):
            raise ColumnError("variant: expected one of the names in the chunk")
        for name in ("weights", "scores", "logits"):
            dropped = name == "logits" and (
                self._live or chunk.first + chunk.count <= self.dropped_logits
            )
            if flags & FLAGS[name] and name not in columns and not dropped:
                raise ColumnError(f"{name} is missing")
        if "alternatives" in columns:
            widths = [columns[n].shape[1] for n in ALTERNATIVES[1:] if n in columns]
            if len(widths) != 2 or int(columns["alternatives"].max()) > min(widths):
                raise ColumnError("alternatives: expected one list a frame")
        if flags & SHADOW and not set(_shadow_columns(strings)) <= set(columns):
            raise ColumnError("shadow is missing")

    def _skip(self, chunk: _Chunk, why: str) -> None:
        if not chunk.fault:
            chunk.fault = why
            self.problems.append(
                f"chunk at frame {chunk.first}: {single_line(why, 200)};"
                f" {chunk.count} frames skipped"
            )


FIELD_NAMES = tuple(name for name, *_ in ARRAYS)


def _shadow_columns(strings: ChunkStrings) -> tuple[str, ...]:
    names = [f"shadow{j}" for j in range(len(strings.shadows))]
    return tuple(name + suffix for name in names for suffix in ("", *_DOTTED))


_DOTTED = tuple(f".{field}" for field in SHADOW_FIELDS)


def _fold(path: Path) -> None:
    """Fold a recording that ended while somebody read it into one file, if nobody reads it now."""
    wal = database.wal_path(path)
    if not wal.exists() or lock.is_held(wal):
        return
    try:
        db = sqlite3.connect(path, isolation_level=None, timeout=0.1)
    except sqlite3.Error:
        return
    try:
        database.fold_wal(db)
    finally:
        db.close()
