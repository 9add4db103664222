"""The `.moetrace` file as SQLite: its tables, how it is opened, and what is checked before.

Everything about SQL that the writer and the reader share. A file of somebody else's is hostile:
it is opened read-only, may hold our four tables and nothing else, and queries run under limits, an
authorizer and a deadline. What the rows mean is in `record.py`, `chunk.py` and `metadata.py`.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from moescope.trace.columns import COLUMN_BYTES
from moescope.trace.metadata import VERSION, trace_error

APPLICATION_ID = 0x4D534350
PAGE_SIZE = 4096
MAGIC = b"SQLite format 3\x00"
TABLES = {
    "meta": "CREATE TABLE meta(k TEXT PRIMARY KEY, v)",
    "event": "CREATE TABLE event(i INTEGER PRIMARY KEY, kind TEXT, json TEXT, crc INTEGER)",
    "tail": "CREATE TABLE tail(i INTEGER PRIMARY KEY, crc INTEGER, b BLOB)",
    "chunk": "CREATE TABLE chunk(name TEXT, first INTEGER, n INTEGER, crc INTEGER, b BLOB,"
    " PRIMARY KEY(name, first))",
}
INDEXES = {"sqlite_autoindex_meta_1": "meta", "sqlite_autoindex_chunk_1": "chunk"}
DEADLINE_S = 10.0  # of one query on a stranger's file; ours take milliseconds
STEPS = 20_000  # of SQLite's machine between two looks at the clock
JOINED_WAL = 2  # the header's word for a file that has a -wal beside it
CONVERT_HINT = "moescope convert reads other formats"

# What reading a damaged file may raise; sqlite3 decodes the messages of SQLite, which quote it.
READ_ERRORS = (sqlite3.Error, UnicodeDecodeError)

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_TRANSACTION}


def wal_path(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def create(path: Path, rows: dict[str, Any]) -> None:
    """A new trace in one file, whole but not yet synced: its tables, and `rows` in `meta`. Raises
    sqlite3.Error."""
    with closing(_connect(path)) as db:
        for pragma in (f"page_size={PAGE_SIZE}", f"application_id={APPLICATION_ID}"):
            db.execute(f"PRAGMA {pragma}")
        db.execute(f"PRAGMA user_version={VERSION}")
        db.execute("PRAGMA synchronous=OFF")
        db.execute("BEGIN IMMEDIATE")
        for statement in TABLES.values():
            db.execute(statement)
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
        db.execute("COMMIT")


def open_writing(path: Path, durable: bool) -> sqlite3.Connection:
    """A trace to record into, in WAL mode, with its `-wal` beside it. Raises sqlite3.Error."""
    db = _connect(path)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        db.execute("SELECT count(*) FROM meta").fetchone()  # only now is there a -wal
    except BaseException:
        db.close()
        raise
    return db


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)


def fold_wal(db: sqlite3.Connection) -> bool:
    """Make the trace one file again. False where another connection still reads it."""
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return bool(db.execute("PRAGMA journal_mode=DELETE").fetchone()[0] == "delete")
    except sqlite3.OperationalError:
        return False


def check_header(path: Path) -> bool:
    """Look at the first 100 bytes and the size. Returns whether the file was copied without its
    `-wal`. Raises `MoescopeError` (TRACE) where it is no trace, or was cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(MAGIC):
        found = "an empty file" if size == 0 else "something else"
        raise trace_error(path, f"expected a moescope trace, found {found}", CONVERT_HINT)
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise trace_error(path, "expected a moescope trace, found another SQLite file")
    page_size = int.from_bytes(head[16:18], "big")
    if page_size != PAGE_SIZE:
        raise trace_error(path, f"page size: expected {PAGE_SIZE}, found {page_size}")
    joined = JOINED_WAL in (head[18], head[19])
    pages = int.from_bytes(head[28:32], "big")
    if size < pages * page_size or (size != pages * page_size and not joined):
        raise trace_error(
            path,
            f"size: expected {pages * page_size:,} bytes, found {size:,}: the file was cut",
            "copy it again",
        )
    return joined


def open_reading(path: Path, immutable: bool) -> tuple[sqlite3.Connection, Deadline]:
    """A connection that can do nothing but read our four tables, checked and under limits."""
    uri = f"{path.absolute().as_uri()}?mode=ro" + ("&immutable=1" if immutable else "")
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, COLUMN_BYTES + (1 << 20))
        db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4096)
        db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        db.setlimit(sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 0)
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        deadline = Deadline()
        db.set_progress_handler(deadline.passed, STEPS)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "query_only=ON"):
            db.execute(f"PRAGMA {pragma}")
        _check_identity(db, path)
        db.set_authorizer(_authorize)
    except BaseException:
        db.close()
        raise
    return db, deadline


def _check_identity(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise trace_error(path, "expected a moescope trace, found another SQLite file")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise trace_error(
            path,
            f"format version: expected {VERSION}, found {version}",
            "read it with the version of moescope that wrote it, or a newer one",
        )
    rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchmany(16)
    expected: set[tuple[str, str, str, str | None]] = {
        ("table", name, name, sql) for name, sql in TABLES.items()
    }
    expected |= {("index", name, table, None) for name, table in INDEXES.items()}
    if not rows:
        raise trace_error(path, *COPIED_WITHOUT_WAL)
    if len(rows) != len(expected) or set(rows) != expected:
        raise trace_error(path, "tables: expected those of a trace, found others")


COPIED_WITHOUT_WAL = (
    "this copy was made while recording, and the -wal file beside it is missing",
    "copy the -wal file too, or: moescope convert TRACE COPY.moetrace (also while recording)",
)


def _authorize(action: int, table: str | None, *_: object) -> int:
    if action in _ALLOWED or (action == sqlite3.SQLITE_READ and table in TABLES):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


class Deadline:
    """Ends a query that takes longer than any query of ours does."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + DEADLINE_S

    def passed(self) -> bool:
        return time.monotonic() > self._end
