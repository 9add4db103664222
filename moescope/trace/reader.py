"""`TraceReader`: reads a `.moetrace`, somebody else's or the one being recorded now.

Frames are counted in the order they were appended. Chunks are read when they are needed, one column
at a time where that is enough; one that is damaged is skipped and named in `problems`, and the
others stay readable. How the file is opened and guarded is in `database.py`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MoescopeError
from moescope.safety import LIMITS, single_line
from moescope.trace import database, lanes, lock
from moescope.trace.chunk import columns_of
from moescope.trace.chunks import Chunk, Chunks
from moescope.trace.columns import ColumnError, checksum
from moescope.trace.fields import parse_json
from moescope.trace.frames import Frame, TraceEvent, TraceMeta
from moescope.trace.metadata import (
    classes_by_router_count,
    event_from_json,
    from_json,
    nothing_readable,
    trace_error,
    unpack_tensors,
)
from moescope.trace.output import CHUNK_FRAMES, meta_checksum
from moescope.trace.record import frame_of

TAIL_LIMIT = 4 * CHUNK_FRAMES
EVENT_LIMIT = 1_000_000
JSON_LIMIT = 16 << 20


class TraceReader:
    """One open trace. Safe to use from several threads; `refresh` shows what came since."""

    def __init__(self, path: Path, *, live: bool, foreign: bool) -> None:
        self.path = path
        self.problems: list[str] = []  # one sentence each: what is damaged, and what was skipped
        self.complete = False  # the recording was ended properly
        self._live, self._foreign = live, foreign
        self._guard = threading.RLock()
        self._tail: list[Frame | None] = []
        self._events: list[tuple[TraceEvent, int]] = []
        self._next_event = 0
        self._keys = np.empty((0, 3), dtype=np.int64)
        self.meta = TraceMeta()
        self._closed: Any = None
        self._connection: tuple[sqlite3.Connection, database.Deadline] | None = None
        self._chunks = self._no_chunks()

    @classmethod
    def open(cls, path: str | Path, *, live: bool = False, foreign: bool = True) -> TraceReader:
        """Open a trace. `live`: our own, being recorded now. `foreign`: check every value.

        Raises `MoescopeError` (TRACE) with a sentence for whatever is wrong with the file.
        """
        reader = cls(Path(path), live=live, foreign=foreign and not live)
        try:
            with reader._query() as db:
                reader._read_meta(db)
            reader._chunks = reader._no_chunks()
            reader.refresh()
            if reader.complete:
                reader._compare_with_closed()
            elif reader._without_wal and not reader.count:
                raise trace_error(path, *database.COPIED_WITHOUT_WAL)
        except BaseException:
            reader.close()
            raise
        return reader

    def close(self) -> None:
        """Close the file; the last to read a recording that ended tidies up its WAL."""
        with self._guard:
            self._disconnect()
            if self._live:
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
        return self._chunks.end + len(self._tail)

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes that have frames."""
        lanes_found = np.unique(self.keys()[:, 1])
        return tuple(lanes_found[lanes_found >= 0].tolist())

    def frame(self, index: int) -> Frame:
        """One frame. Raises IndexError beyond the end, `MoescopeError` where it is damaged."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        for frame in self.frames(index, index + 1):
            return frame
        raise trace_error(self.path, f"frame {index} cannot be read")

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames `start` to `stop`, without the damaged ones: see `numbered`."""
        return (frame for _, frame in self.numbered(start, stop))

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Frame]]:
        """Frames `start` to `stop` with their indices, which jump where frames are damaged."""
        stop = self.count if stop is None else min(stop, self.count)
        at = max(start, 0)
        while at < stop:
            with self._guard:
                batch: Sequence[Frame | None]
                if at < self._chunks.end:
                    batch, end = self._chunks.frames(at, stop)
                else:
                    low, high = at - self._chunks.end, stop - self._chunks.end
                    batch, end = self._tail[low:high], stop
            for index, frame in enumerate(batch, start=at):
                if frame is not None:
                    yield index, frame
            at = end

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
                if at < self._chunks.end:
                    rows, end = self._chunks.column(name, at, stop)
                else:
                    low, high = at - self._chunks.end, stop - self._chunks.end
                    rows, end = lanes.column_of_frames(name, self._tail[low:high]), stop
            parts.append((end - at, rows))
            at = end
        return lanes.joined(name, parts)

    def verify(self) -> None:
        """Read all of a trace once, so that `problems` names everything that is damaged and no
        answer mixes one column of a damaged chunk with the absence of another. Raises
        `MoescopeError` (TRACE) where no frame can be read."""
        with self._guard:
            readable = self._chunks.verify()
            self._keys = self._keys[:0]
        readable = readable or any(frame is not None for frame in self._tail)
        if self.problems and not readable:
            raise nothing_readable(self.path, self.problems)

    def events(self) -> list[TraceEvent]:
        """Everything that happened beside the tokens, in order."""
        return [event for event, _ in self._events]

    def placed_events(self) -> list[tuple[TraceEvent, int]]:
        """Events, each with the number of frames appended before it. Not to be changed."""
        return self._events

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
        with self._query() as db:
            db.execute("BEGIN")  # chunks, tail and events of one moment
            try:
                if self._live and not self.complete:
                    self._read_closed(db)
                self._read_chunks(db)
                self._read_tail(db)
                self._read_events(db)
            finally:
                db.execute("ROLLBACK")
        if self.complete and not before[2]:
            self._compare_with_closed()
        return before != (self.count, len(self._events), self.complete)

    # --- opening ----------------------------------------------------------------------------------

    def _connect(self) -> tuple[sqlite3.Connection, database.Deadline]:
        try:
            wal = database.wal_path(self.path).exists()
            if not self.path.is_file():
                raise trace_error(self.path, "expected a file, found none")
            joined = False if wal or self._live else database.check_header(self.path)
            connection = database.open_reading(self.path, immutable=not wal and not self._live)
        except database.READ_ERRORS as error:
            raise self._damaged(error) from error
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise trace_error(self.path, reason) from error
        self._without_wal = joined
        return connection

    @contextmanager
    def _query(self) -> Iterator[sqlite3.Connection]:
        """A connection, under the guard and a fresh deadline, with SQLite's errors as sentences.

        Of a recording that ended under our eyes it is kept for one query only: its writer can make
        one file of it as soon as nobody holds its WAL.
        """
        with self._guard:
            if self._connection is None:
                self._connection = self._connect()
            db, deadline = self._connection
            deadline.restart()
            try:
                yield db
            except (*database.READ_ERRORS, OSError) as error:
                raise self._damaged(error) from error
            finally:
                if self._live and self.complete:
                    self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection[0].close()
            self._connection = None

    def _damaged(self, error: Exception) -> MoescopeError:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_CANTOPEN":
            message = "cannot be opened: to read a recording that did not end, its folder must be"
            return trace_error(self.path, f"{message} writable")
        if "interrupted" in str(error):
            return trace_error(self.path, "reading takes longer than any trace of moescope does")
        return trace_error(self.path, f"the file is damaged ({single_line(str(error), 120)})")

    def _read_meta(self, db: sqlite3.Connection) -> None:
        rows: dict[str, Any] = {}
        for key, value in db.execute("SELECT k, v FROM meta"):
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
        self.meta.router_tensors.update(self._tensors(rows))
        self._closed = self._json(rows["closed"], "closed") if "closed" in rows else None
        self.complete = self._closed is not None
        if self._without_wal and not self.complete:
            self.problems.append(
                f"{database.COPIED_WITHOUT_WAL[0]}: the newest tokens are not in it"
            )

    def _read_closed(self, db: sqlite3.Connection) -> None:
        row = db.execute("SELECT v FROM meta WHERE k = 'closed'").fetchone()
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

    def _tensors(self, rows: dict[str, Any]) -> dict[int, dict[str, NDArray[Any]]]:
        packed = []
        for key, value in rows.items():
            kind, _, place = key.partition("/")
            if kind == "tensor" and isinstance(value, bytes):
                router, _, name = place.partition("/")
                packed.append((router, name, value))
        return unpack_tensors(packed, self.path)

    def _compare_with_closed(self) -> None:
        closed = self._closed if isinstance(self._closed, dict) else {}
        for what, found in (("frames", self.count), ("events", len(self._events))):
            if closed.get(what) != found:
                wanted = single_line(str(closed.get(what)), 20)
                self.problems.append(f"{wanted} {what} were recorded, {found} can be read")

    # --- the index --------------------------------------------------------------------------------

    def _no_chunks(self) -> Chunks:
        def select(query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
            with self._query() as db:
                return db.execute(query, values).fetchall()

        def lacks_logits(chunk: Chunk) -> bool:
            return self._live or chunk.end <= self.dropped_logits

        classes = classes_by_router_count(self.meta)
        absent = self.meta.absent
        return Chunks(select, self.problems, classes, absent, self._foreign, lacks_logits)

    def _read_chunks(self, db: sqlite3.Connection) -> None:
        chunks, before = self._chunks, self._chunks.end
        most = self.path.stat().st_size  # frames that can be missing: none takes less than a byte
        query = "SELECT first, n FROM chunk WHERE name = 'flags' AND first >= ? ORDER BY first"
        for first, count in db.execute(query, (before,)):
            fits = isinstance(first, int) and isinstance(count, int)
            if not fits or not 1 <= count <= CHUNK_FRAMES:
                self.problems.append("a chunk with an impossible place was skipped")
                continue
            if not chunks.end <= first <= chunks.end + most:
                self.problems.append("a chunk with an impossible place was skipped")
                continue
            if first > chunks.end:
                chunks.add(first - chunks.end, "is missing")
            chunks.add(count)
        self._tail = self._tail[chunks.end - before :]

    def _read_tail(self, db: sqlite3.Connection) -> None:
        query = "SELECT i, crc, b FROM tail WHERE i >= ? ORDER BY i"
        for i, crc, blob in db.execute(query, (self.count,)):
            if not isinstance(i, int) or i - self._chunks.end > TAIL_LIMIT:
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
                self._chunks.check_columns(Chunk(i, 1), columns_of([frame]))
            return frame
        except ColumnError as error:
            self.problems.append(f"frame {i}: {error}; skipped")
            return None

    def _read_events(self, db: sqlite3.Connection) -> None:
        query = "SELECT i, kind, json, crc FROM event WHERE i >= ? ORDER BY i"
        for i, kind, text, crc in db.execute(query, (self._next_event,)):
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


def _fold(path: Path) -> None:
    """Fold our own recording, ended while somebody read it, into one file if nobody does now."""
    wal = database.wal_path(path)
    if not wal.exists() or lock.is_held(wal):
        return
    try:
        uri = f"{path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0.1)
    except sqlite3.Error:
        return
    try:
        database.fold_wal(db)
    finally:
        db.close()
