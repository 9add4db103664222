"""Throw-away children with limits, for foreign data that a library may panic, abort or hang on.

`run` starts `guarded_child.py` with an empty environment and bounded processor time, memory, output
and wall clock, hands it bytes, and gives back what it answered or why it did not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moescope.safety import LIMITS, single_line

_CHILD = Path(__file__).with_name("guarded_child.py")
_LIBRARY = {"tokenizer": "tokenizers", "template": "jinja2"}
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
_WALL = 3.0  # times the processor time: on a busy machine a child waits


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child said; `trouble` (printable, for a message) where it did not do its task."""

    value: dict[str, Any]
    trouble: str = ""
    refused: bool = False


def run(
    task: Literal["tokenizer", "template"], payload: bytes, *, seconds: float, memory: int
) -> Answer:
    """Do a task in a fresh child that gets `seconds` of processor time and `memory` bytes."""
    site = importlib.util.find_spec(_LIBRARY[task])
    if site is None or site.origin is None:
        return Answer({}, f"{_LIBRARY[task]} is not installed")
    limits = (str(max(int(seconds), 1)), str(memory))
    command = (sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD), task, *limits)
    try:
        child = subprocess.Popen(
            [*command, str(Path(site.origin).parent.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        return Answer({}, single_line(f"no child could be started: {error.strerror}"))
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        child.kill()

    clock = threading.Timer(seconds * _WALL, stop)
    clock.daemon = True
    clock.start()
    try:
        output = _exchange(child, payload)
    finally:
        clock.cancel()
        child.kill()
        child.wait()
    if output:
        return _read(output)
    if expired.is_set() or child.returncode == -signal.SIGXCPU:
        return Answer({}, f"took longer than {seconds:g} s")
    return Answer({}, f"crashed ({_ending(child.returncode)})")


def _exchange(child: subprocess.Popen[bytes], payload: bytes) -> bytes:
    """Hand over the payload and take the answer; a child that dies meanwhile answers nothing."""
    assert child.stdin is not None and child.stdout is not None
    most = 6 * LIMITS.rendered_chars + 4096  # JSON writes a character in up to 6 bytes
    with child.stdout as answers:
        with contextlib.suppress(BrokenPipeError), child.stdin as task:
            task.write(payload)
        output = answers.read(most)
    child.kill() if len(output) == most else child.wait()
    return output.strip()


def _read(output: bytes) -> Answer:
    try:
        value = json.loads(output)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return Answer({}, "gave no answer")
    trouble = value.get("error") or value.get("refused") or ""
    return Answer(value, single_line(str(trouble), 300), "refused" in value)


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
