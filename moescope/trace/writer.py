"""`TraceWriter`: records frames and events into a `.moetrace` while a model runs.

The engine's thread calls `append` and goes on; one writer thread commits. A frame is acknowledged
when its insert is committed: at once while decoding, every 16 frames or 50 ms while prefilling.
Every 256 frames the tail becomes a chunk. The bytes are made in `record.py` and `chunk.py`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import sqlite3
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace import database, lock
from moescope.trace.columns import checksum, pack
from moescope.trace.fold import columns_of_records
from moescope.trace.frames import DECODE, Frame, TraceEvent, TraceMeta
from moescope.trace.metadata import event_to_json, redact_event, router_groups, to_json, trace_error
from moescope.trace.record import Arrays, record

CHUNK_FRAMES = 256
CHUNK_BYTES = 24 << 20  # a chunk of large frames is cut earlier, so that no column nears its limit
QUEUE_BYTES = 32 << 20  # waiting for the writer thread; when full, `append` waits
QUEUE_ITEMS = 512
PREFILL_FRAMES, PREFILL_S = 16, 0.050
CLOSE_PATIENCE_S = 0.25  # for live readers to notice the end; else the last of them tidies up
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a file
FREED_SHARE = 0.05  # of the limit, freed at once: not every chunk shall begin by making room


class _Item(NamedTuple):
    """A frame as a record, or an event as (kind, JSON)."""

    blob: bytes
    is_decode: bool
    event: tuple[str, str] | None = None


class TraceWriter:
    """Writes one trace. `append` and `event` may be called from one thread at a time.

    `durable` syncs every commit to the disk (power loss; `kill -9` loses nothing either way).
    `limit_bytes` bounds the file: the oldest logits are dropped first, then recording stops.
    An existing file is not replaced without `force` (an empty one is filled, keeping its mode).
    Raises `MoescopeError` (OUTPUT) where the file cannot be written, (TRACE) where another process
    is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        durable: bool = False,
        limit_bytes: int | None = None,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self.meta = replace(meta, prompt_ids=None) if meta.redacted else meta
        self.limit_bytes = limit_bytes
        self._shown = single_line(str(path))
        self._redact = meta.redacted
        self._router_counts = tuple(len(routers) for routers in router_groups(meta))
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._accepted = self._done = 0  # items
        self._appended = self._acknowledged = 0  # frames
        self._dropped_logits = 0
        self._failure: MoescopeError | None = None
        self._told = False  # the failure was raised once
        self._closing = self._closed = False
        self._flushers = 0
        self._tail: list[bytes] = []  # records of the frames not yet in a chunk
        self._tail_bytes = 0
        self._chunked = 0  # frames in chunks
        self._events = 0
        self._rows: dict[str, Any] = {}
        self._db = self._open(durable, force)
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    # --- the caller's side ------------------------------------------------------------------------

    def append(self, frame: Frame) -> None:
        """Queue one frame; waits only when the queue is full. The arrays are copied.

        Raises ValueError for a frame that is not of the routers in the meta: nobody could read it.
        """
        self.extend([(frame, None)])

    def extend(self, frames: Iterable[tuple[Frame, Arrays | None]]) -> None:
        """Queue the frames of one step, which are committed together; see `append`, and `record`
        for what may stand beside a frame."""
        items = [self._item(frame, arrays) for frame, arrays in frames]
        for start in range(0, len(items), QUEUE_ITEMS // 2):
            self._put(items[start : start + QUEUE_ITEMS // 2])
        self._appended += len(items)

    def _item(self, frame: Frame, arrays: Arrays | None) -> _Item:
        routers = len(frame.expert_ids)
        if self._router_counts and routers not in self._router_counts:
            raise ValueError(f"a frame of {routers} routers, meta has {self._router_counts}")
        blob = record(frame, self.meta.record, self._redact, arrays)
        return _Item(blob, frame.phase == DECODE)

    def event(self, event: TraceEvent) -> None:
        """Queue an event; it keeps its place among the frames. TypeError if it is no JSON."""
        kept = redact_event(event) if self._redact else event
        if kept is not None:
            self._put([_Item(b"", True, _event_row(kept, self._appended))])

    def flush(self) -> None:
        """Wait until everything appended so far is committed."""
        with self._changed:
            goal = self._accepted
            self._flushers += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= goal or self._failure is not None)
            self._flushers -= 1
            self._raise_failure()

    @property
    def acknowledged(self) -> int:
        """Frames committed: none of them is lost when the process is killed."""
        return self._acknowledged

    @property
    def dropped_logits(self) -> int:
        """Frames, the oldest, whose logits were dropped to stay within `limit_bytes`."""
        return self._dropped_logits

    def close(self) -> None:
        """Commit everything and fold the trace into one file. Doing it twice changes nothing.

        Raises the failure that stopped the recording, if no call raised it before.
        """
        if self._closed:
            return
        self._closed = True
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not self._told:
            self._raise_failure()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MoescopeError:
            if error is None:
                raise

    def _put(self, items: list[_Item]) -> None:
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._raise_failure()
            if self._closing:
                raise MoescopeError(f"{self._shown}: the trace is closed", code=ExitCode.OUTPUT)
            self._queue += items
            self._queued_bytes += sum(len(item.blob) for item in items)
            self._accepted += len(items)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        full = len(self._queue) >= QUEUE_ITEMS or self._queued_bytes >= QUEUE_BYTES
        return not full or self._failure is not None or self._closing

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._told = True
            raise self._failure

    # --- opening ----------------------------------------------------------------------------------

    def _open(self, durable: bool, force: bool) -> sqlite3.Connection:
        self._clear_place(force)
        try:
            db = database.create(self.path)
            try:
                self._begin(db, durable)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            if _is_full(error):  # any other error may be about a file that somebody else made
                self._remove()
            raise _output_error(self._shown, f"cannot be written: {_reason(error)}") from error
        return db

    def _begin(self, db: sqlite3.Connection, durable: bool) -> None:
        """What is in a trace before its first frame."""
        self._rows = {"meta": json.dumps(to_json(self.meta))}
        self._rows["writer"] = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        for router, tensors in self.meta.router_tensors.items():
            for name, array in tensors.items():
                self._rows[f"tensor/{router}/{name}"] = pack(array)
        db.execute("BEGIN IMMEDIATE")
        _write_rows(db, self._rows)
        db.execute("COMMIT")
        # A copy made while recording shall at least have the tables and say what it is. One
        # sync for all of this; its descriptor stays open, for closing it would take away the
        # locks that SQLite has on the file in this process.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._descriptor = os.open(self.path, os.O_RDONLY)
        os.fsync(self._descriptor)
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._lock = lock.hold(database.wal_path(self.path))

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            for suffix in ("", *BESIDE):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _clear_place(self, force: bool) -> None:
        owner = lock.writer_of(self.path)
        if owner is not None:
            raise trace_error(self._shown, f"trace is being written by process {owner}")
        try:
            if self.path.is_dir():
                raise _output_error(self._shown, "is a folder")
            if self.path.exists() and not self.path.is_file():
                raise _output_error(self._shown, "is no regular file")
            if self.path.exists() and self.path.stat().st_size:
                if not force:
                    raise _output_error(
                        self._shown, "already exists", "give another name, or --force to replace it"
                    )
                self.path.unlink()
            for suffix in BESIDE:
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise _output_error(self._shown, f"cannot be written: {_reason(error)}") from error

    # --- the writer thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while items := self._take():
                self._commit(items)
                while len(self._tail) >= CHUNK_FRAMES or self._tail_bytes >= CHUNK_BYTES:
                    self._fold_tail()
                    self._keep_limit()
            self._finish()
        except MoescopeError as failure:
            self._fail(failure)
        except (sqlite3.Error, OSError, MemoryError) as error:
            self._fail(self._stopped(_reason(error)))
        except Exception as error:  # ours; an engine that waits for this thread shall not hang
            words = single_line(f"{type(error).__name__}: {error}", 200)
            message = f"{self._shown}: recording stopped: {words}"
            self._fail(MoescopeError(message, code=ExitCode.BUG))
        finally:
            self._db.close()
            os.close(self._descriptor)
            lock.release(self._lock)

    def _take(self) -> list[_Item]:
        """The items of the next commit; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(self._commit_is_due, PREFILL_S)
            items: list[_Item] = []
            while self._queue and len(items) < CHUNK_FRAMES:
                items.append(self._queue.popleft())
                self._queued_bytes -= len(items[-1].blob)
            self._changed.notify_all()
            return items

    def _commit_is_due(self) -> bool:
        queue = self._queue
        if self._closing or self._flushers or len(queue) >= PREFILL_FRAMES:
            return True
        return bool(queue) and (queue[-1].is_decode or self._queued_bytes >= QUEUE_BYTES)

    def _commit(self, items: list[_Item]) -> None:
        frames = [item.blob for item in items if item.event is None]
        first = self._chunked + len(self._tail)
        rows = [
            (i, checksum("tail", i, 1, blob), blob) for i, blob in enumerate(frames, start=first)
        ]
        events = [item.event for item in items if item.event is not None]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO tail VALUES (?, ?, ?)", rows)
        for number, event in enumerate(events, start=self._events):
            self._insert_event(number, *event)
        self._db.execute("COMMIT")
        self._tail += frames
        self._tail_bytes += sum(map(len, frames))
        self._events += len(events)
        with self._changed:
            self._acknowledged += len(frames)
            self._done += len(items)
            self._changed.notify_all()

    def _insert_event(self, number: int, kind: str, text: str) -> None:
        crc = checksum(f"event/{kind}", number, 1, text.encode())
        self._db.execute("INSERT INTO event VALUES (?, ?, ?, ?)", (number, kind, text, crc))

    def _fold_tail(self) -> None:
        """Move the oldest of the tail into a chunk in one transaction."""
        sizes = itertools.accumulate(map(len, self._tail[:CHUNK_FRAMES]))
        count = max(1, sum(size <= CHUNK_BYTES for size in sizes))
        first, oldest = self._chunked, self._tail[:count]
        columns = columns_of_records(oldest)
        blobs = ((name, pack(column)) for name, column in columns.items())
        rows = [(name, first, count, checksum(name, first, count, b), b) for name, b in blobs]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO chunk VALUES (?, ?, ?, ?, ?)", rows)
        self._db.execute("DELETE FROM tail WHERE i < ?", (first + count,))
        self._db.execute("COMMIT")
        self._chunked += count
        self._tail = self._tail[count:]
        self._tail_bytes -= sum(map(len, oldest))

    def _keep_limit(self) -> None:
        """Drop the oldest logits until the file is small enough; else stop the recording."""
        if self.limit_bytes is None or self._used_bytes() <= self.limit_bytes:
            return
        goal = int(self.limit_bytes * (1 - FREED_SHARE))
        chunks = self._db.execute(
            "SELECT first, n FROM chunk WHERE name = 'logits' ORDER BY first"
        ).fetchall()
        dropped = self._dropped_logits
        self._db.execute("BEGIN IMMEDIATE")
        for first, count in chunks:
            self._db.execute("DELETE FROM chunk WHERE name = 'logits' AND first = ?", (first,))
            dropped = first + count
            if self._used_bytes() <= goal:
                break
        if dropped != self._dropped_logits:
            text = f"logits of the first {dropped:,} frames dropped to stay within the size limit"
            note = TraceEvent("note", {"text": text, "dropped_logits": dropped})
            self._insert_event(self._events, *_event_row(note, self._chunked))
            self._events += 1
        self._db.execute("COMMIT")
        self._dropped_logits = dropped
        if self._used_bytes() > self.limit_bytes:
            raise self._stopped(f"the limit of {self.limit_bytes:,} bytes is reached")

    def _used_bytes(self) -> int:
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        free = self._db.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages - free) * database.PAGE_SIZE

    def _finish(self) -> None:
        """The end of a recording: everything in chunks, the counts written, one file."""
        while self._tail:
            self._fold_tail()
        self._rows["closed"] = json.dumps({"frames": self._chunked, "events": self._events})
        self._db.execute("BEGIN IMMEDIATE")
        _write_rows(self._db, self._rows)
        self._db.execute("COMMIT")
        self._db.execute("PRAGMA busy_timeout=50")
        patience = time.monotonic() + CLOSE_PATIENCE_S
        while not database.fold_wal(self._db) and time.monotonic() < patience:
            time.sleep(0.02)

    def _stopped(self, reason: str) -> MoescopeError:
        return _output_error(
            self._shown,
            f"{reason}: recording stopped at token {self._acknowledged}; the file is good",
        )

    def _fail(self, failure: MoescopeError) -> None:
        with self._changed:
            self._failure = failure
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            database.fold_wal(self._db)
        except sqlite3.Error:
            pass  # the file stays as it is: readable, with its -wal


def _event_row(event: TraceEvent, at: int) -> tuple[str, str]:
    return event.kind, json.dumps(event_to_json(event, at))


def _write_rows(db: sqlite3.Connection, rows: dict[str, Any]) -> None:
    """Write all of `meta`, and a checksum over it."""
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows.items())
    db.execute("INSERT OR REPLACE INTO meta VALUES ('crc', ?)", (meta_checksum(rows),))


def meta_checksum(rows: dict[str, Any]) -> int:
    """CRC-32 over the rows of `meta` in the order of their keys."""
    crc = 0
    for key in sorted(rows):
        value = rows[key]
        stored = value.encode() if isinstance(value, str) else value
        crc = zlib.crc32(stored, zlib.crc32(f"{key}:{len(stored)}".encode(), crc))
    return crc


def _output_error(shown: str, message: str, hint: str = "") -> MoescopeError:
    return MoescopeError(f"{shown}: {message}", hint=hint, code=ExitCode.OUTPUT)


def _is_full(error: BaseException) -> bool:
    """Also where SQLite only says that the file took no more of some kind of bytes."""
    name = getattr(error, "sqlite_errorname", "") or ""
    full = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")
    return name in full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _reason(error: BaseException) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if _is_full(error):
        return "disk full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if name.startswith("SQLITE_IOERR"):
        return f"the disk took no more ({name})"
    return single_line(str(error), 200)
