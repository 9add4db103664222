"""A screen that dies must not take the terminal with it."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

SCREEN = """
import os, signal, sys, termios, tty
sys.path.insert(0, {root!r})
from moescope import supervisor
def work():
    tty.setraw(0)
    sys.stderr.write("\\x1b[?1049h\\x1b[?25lREADY")
    sys.stderr.flush()
    if {number} == 0:
        return 6
    signal.signal({number}, signal.SIG_DFL) if {number} not in (9, 19) else None
    os.kill(os.getpid(), {number})
    signal.pause()
sys.exit(supervisor.watch(work))
"""
ROOT = str(Path(__file__).parents[1])


def run_in_terminal(code: str) -> tuple[int, bytes, bool]:
    """Run `code` on a new terminal; returns exit code, output, and whether echo is on after."""
    child, master = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    output, deadline = b"", time.monotonic() + 30
    status = None
    while status is None and time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.05)
        if ready:
            with contextlib.suppress(OSError):
                output += os.read(master, 65536)
        done, value = os.waitpid(child, os.WNOHANG)
        status = value if done else None
    assert status is not None, "the supervisor did not end"
    while select.select([master], [], [], 0.05)[0]:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    try:
        cooked = bool(termios.tcgetattr(master)[3] & termios.ECHO)
    except termios.error:
        cooked = True  # the terminal went with its last user
    os.close(master)
    return os.waitstatus_to_exitcode(status), output, cooked


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGTERM", "SIGFPE"])
def test_the_terminal_is_repaired_after_a_signal(name: str) -> None:
    number = int(getattr(signal, name))
    code, output, cooked = run_in_terminal(SCREEN.format(root=ROOT, number=number))
    assert code == 128 + number
    assert b"READY" in output
    after = output.split(b"READY", 1)[1]
    for sequence in (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?1003l", b"\x1b[?2004l"):
        assert sequence in after
    assert f"ended by {name}".encode() in after
    assert b"Traceback" not in output
    assert cooked


def test_a_normal_end_passes_its_exit_code() -> None:
    code, output, _ = run_in_terminal(SCREEN.format(root=ROOT, number=0))
    assert code == 6
    assert b"\x1b[?1049l" not in output


def test_signals_reach_the_screen() -> None:
    waits = """
import os, signal, sys
sys.path.insert(0, {root!r})
from moescope import supervisor
def work():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
sys.exit(supervisor.watch(work))
"""
    code, _, _ = run_in_terminal(waits.format(root=ROOT))
    assert code == 143
