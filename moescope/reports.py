"""Reports of our own bugs: a file with the stack (no values, no prompts), versions and the verb.

Written to the state folder with mode 0600; the newest twenty are kept.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

KEPT = 20


def folder() -> Path:
    """Where state that is not the user's work lives: logs, reports, unsaved recordings."""
    chosen = os.environ.get("MOESCOPE_STATE")
    if chosen:
        return Path(chosen)
    from platformdirs import user_state_path

    return user_state_path("moescope", appauthor=False)


def write(error: BaseException, arguments: Sequence[str] = ()) -> Path | None:
    """Write a report; returns its path, or None where none could be written."""
    from moescope import __version__

    verb = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    stack = "".join(traceback.format_tb(error.__traceback__))
    text = (
        f"moescope {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"verb: {verb if verb.isidentifier() else '-'}\n"
        f"{type(error).__module__}.{type(error).__name__}\n\n{stack}"
    )
    reports = folder() / "reports"
    try:
        reports.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = reports / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        for old in sorted(reports.glob("*.txt"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return None
    return path
