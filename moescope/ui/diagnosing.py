"""The verdict on the trace that is open: `moescope diagnose` in a process of its own.

The screen waits for nothing: it asks, goes on drawing, and is told. Nothing of the model comes into
this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from moescope.safety import printable

ASKED = "the checkpoint it was recorded from: a folder, org/name, or demo"
LIMIT = 100_000  # characters of an answer


async def verdict(trace: Path, model: str, lane: int) -> tuple[str, str]:
    """(headline, the rest) of a diagnosis, or what is wrong. Ends its process when cancelled."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moescope", "diagnose", str(trace)),
        *("--model", model, "--lane", str(lane)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # its own workers go with it
    )
    try:
        out, err = await child.communicate()
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
    text = (out if child.returncode in (0, 1) else err).decode("utf-8", "replace")[:LIMIT]
    first, _, rest = text.strip().partition("\n")
    return printable(first, 400), printable(rest, LIMIT)
