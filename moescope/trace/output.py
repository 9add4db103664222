"""`TraceOutput`: the file that a recording fills, from its tables to its end.

Every commit is whole; frames wait in a tail of records, and each 256 of them become a chunk. What
is committed when, and who waits for it, is `writer.py`'s; readers are told nothing here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import sqlite3
import stat
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace import database, lock
from moescope.trace.columns import checksum, pack
from moescope.trace.fold import columns_of_records
from moescope.trace.frames import TraceEvent, TraceMeta
from moescope.trace.metadata import event_to_json, to_json, trace_error

CHUNK_FRAMES = 256
CHUNK_BYTES = 24 << 20  # a chunk of large frames is cut earlier, so that no column nears its limit
CLOSE_PATIENCE_S = 0.25  # for live readers to notice the end; else the last of them tidies up
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a file
FREED_SHARE = 0.05  # of the limit, freed at once: not every chunk shall begin by making room


class TraceOutput:
    """One file, written by one thread at a time. `frames` are committed; of the first
    `dropped_logits` of them the logits are gone. Raises as `TraceWriter` says."""

    def __init__(
        self,
        path: Path,
        meta: TraceMeta,
        *,
        durable: bool = False,
        limit_bytes: int | None = None,
        force: bool = False,
    ) -> None:
        # SQLite, too, follows a link before it puts anything beside the file.
        self.path = Path(os.path.realpath(path))
        self.meta, self.limit_bytes = meta, limit_bytes
        self.shown = single_line(str(path))
        self.frames = self.dropped_logits = 0
        self._tail: list[bytes] = []  # records of the frames not yet in a chunk
        self._tail_bytes = 0
        self._chunked = 0  # frames in chunks
        self._events = 0
        self._rows: dict[str, Any] = {}
        self._mode: int | None = None  # of the empty file that was here before
        self._db = self._open(durable, force)

    def commit(self, frames: list[bytes], events: list[tuple[str, str]]) -> None:
        """Records of frames and rows of events, all of them or none."""
        first = self.frames
        rows = [
            (i, checksum("tail", i, 1, blob), blob) for i, blob in enumerate(frames, start=first)
        ]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO tail VALUES (?, ?, ?)", rows)
        for number, event in enumerate(events, start=self._events):
            self._insert_event(number, *event)
        self._db.execute("COMMIT")
        self._tail += frames
        self._tail_bytes += sum(map(len, frames))
        self._events += len(events)
        self.frames += len(frames)

    def fold(self) -> None:
        """Move what fills a chunk into one, and keep the limit."""
        while len(self._tail) >= CHUNK_FRAMES or self._tail_bytes >= CHUNK_BYTES:
            self._fold_tail()
            self._keep_limit()

    def finish(self) -> None:
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

    def abandon(self) -> None:
        """Leave the file as the last commit made it."""
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            database.fold_wal(self._db)
        except sqlite3.Error:
            pass  # the file stays as it is: readable, with its -wal

    def discard(self) -> None:
        """Leave the place as it was found: without a file, or with an empty one."""
        _unlink(self.path, BESIDE)
        with contextlib.suppress(OSError):
            if self._mode is None:
                self.path.unlink(missing_ok=True)
            else:
                os.truncate(self.path, 0)

    def close(self) -> None:
        """Give back the file and the lock on it."""
        self._db.close()
        os.close(self._descriptor)
        lock.release(self._lock)

    def stopped(self, reason: str | BaseException) -> MoescopeError:
        """The failure that ends a recording whose file is good so far."""
        words = reason if isinstance(reason, str) else _reason(reason)
        kept = "the file is good" if self.frames else "nothing was recorded"
        return _output_error(
            self.shown, f"{words}: recording stopped at token {self.frames}; {kept}"
        )

    # --- opening ----------------------------------------------------------------------------------

    def _open(self, durable: bool, force: bool) -> sqlite3.Connection:
        self._clear_place(force)
        temporary = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}")
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(_unlink, temporary, ("", "-journal"))
                self._begin(temporary)
                # One sync for all of this; its descriptor stays open, for closing it would take
                # away the locks that SQLite has on the file in this process.
                self._descriptor = os.open(temporary, os.O_RDONLY)
                undo.callback(os.close, self._descriptor)
                os.fsync(self._descriptor)
                undo.callback(self.discard)
                os.replace(temporary, self.path)
                db = database.open_writing(self.path, durable)
                undo.callback(db.close)
                self._lock = lock.hold(database.wal_path(self.path))
                undo.pop_all()
        except (sqlite3.Error, OSError) as error:
            raise _output_error(self.shown, f"cannot be written: {_reason(error)}") from error
        return db

    def _begin(self, temporary: Path) -> None:
        """What is in a trace before its first frame, under another name: whoever finds the file,
        or a copy of it, finds the tables and what it is."""
        self._rows = {"meta": json.dumps(to_json(self.meta))}
        self._rows["writer"] = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        for router, tensors in self.meta.router_tensors.items():
            for name, array in tensors.items():
                self._rows[f"tensor/{router}/{name}"] = pack(array)
        _unlink(temporary, ("", "-journal"))  # of a process that had our number and was killed
        database.create(temporary, {**self._rows, "crc": meta_checksum(self._rows)})
        if self._mode is not None:
            temporary.chmod(self._mode)

    def _clear_place(self, force: bool) -> None:
        owner = lock.writer_of(self.path)
        if owner is not None:
            raise trace_error(self.shown, f"trace is being written by process {owner}")
        try:
            if self.path.is_dir():
                raise _output_error(self.shown, "is a folder")
            if self.path.exists() and not self.path.is_file():
                raise _output_error(self.shown, "is no regular file")
            if self.path.exists() and self.path.stat().st_size:
                if not force:
                    raise _output_error(
                        self.shown, "already exists", "give another name, or --force to replace it"
                    )
                self.path.unlink()
            if self.path.exists():
                self._mode = stat.S_IMODE(self.path.stat().st_mode)
            for suffix in BESIDE:
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise _output_error(self.shown, f"cannot be written: {_reason(error)}") from error

    # --- chunks -----------------------------------------------------------------------------------

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
        dropped = self.dropped_logits
        self._db.execute("BEGIN IMMEDIATE")
        for first, count in chunks:
            self._db.execute("DELETE FROM chunk WHERE name = 'logits' AND first = ?", (first,))
            dropped = first + count
            if self._used_bytes() <= goal:
                break
        if dropped != self.dropped_logits:
            text = f"logits of the first {dropped:,} frames dropped to stay within the size limit"
            note = TraceEvent("note", {"text": text, "dropped_logits": dropped})
            self._insert_event(self._events, *event_row(note, self._chunked))
            self._events += 1
        self._db.execute("COMMIT")
        self.dropped_logits = dropped
        if self._used_bytes() > self.limit_bytes:
            raise self.stopped(f"the limit of {self.limit_bytes:,} bytes is reached")

    def _used_bytes(self) -> int:
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        free = self._db.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages - free) * database.PAGE_SIZE


def event_row(event: TraceEvent, at: int) -> tuple[str, str]:
    """An event after `at` frames as (kind, JSON). TypeError if it is no JSON."""
    return event.kind, json.dumps(event_to_json(event, at))


def _unlink(path: Path, suffixes: Sequence[str]) -> None:
    for suffix in suffixes:
        with contextlib.suppress(OSError):  # a folder that takes no file has none to lose
            path.with_name(path.name + suffix).unlink(missing_ok=True)


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
