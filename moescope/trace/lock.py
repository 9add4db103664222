"""Who is writing a trace: a lock on its `-wal` that the system releases when the writer dies.

The lock is on the `-wal` and not on the trace: closing a second descriptor of a database would take
away the locks SQLite itself holds on it in this process.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

from moescope.trace.database import READ_ERRORS, wal_path

try:
    import fcntl
except ImportError:  # not on Windows: there, nothing tells who writes
    fcntl = None  # type: ignore[assignment]


def hold(path: Path) -> int | None:
    """Lock this file for as long as the descriptor stays open. None where that cannot be done."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some network drives know no locks
        os.close(descriptor)
        return None
    return descriptor


def release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def writer_of(path: Path) -> str | None:
    """The process that is recording this trace now, `unknown` where it does not say; else None."""
    if not is_held(wal_path(path)):
        return None
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=0.5)
        try:
            row = db.execute("SELECT v FROM meta WHERE k = 'writer'").fetchone()
            return str(int(json.loads(row[0])["pid"]))
        finally:
            db.close()
    except (*READ_ERRORS, ValueError, TypeError, KeyError):
        return "unknown"


def is_held(path: Path) -> bool:
    """Whether a process holds this file."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
