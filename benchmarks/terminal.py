"""A program on a pseudo terminal of a known size, read as a terminal would read it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time


class Terminal:
    """Run `argv` on a terminal of `columns` x `rows`; its output is read and dropped."""

    def __init__(self, argv: list[str], columns: int = 120, rows: int = 40, **env: str) -> None:
        self.output = b""
        self.read_bytes = 0
        self.started = time.perf_counter()
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            settings = {"TERM": "xterm-256color", "COLORTERM": "truecolor", **env}
            os.execve(argv[0], argv, {**os.environ, **settings})
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def pump(self, seconds: float) -> bool:
        """Read for at most `seconds`; False once the program is gone."""
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0:
            if not select.select([self.master], [], [], left)[0]:
                break
            try:
                chunk = os.read(self.master, 1 << 16)
            except OSError:
                return False
            self.read_bytes += len(chunk)
            self.output = (self.output + chunk)[-(1 << 20) :]
        return True

    def wait_for(self, text: bytes, timeout: float = 60.0) -> float:
        """Seconds from start until `text` was seen in the output."""
        deadline = time.perf_counter() + timeout
        while text not in self.output:
            if time.perf_counter() > deadline or not self.pump(0.005):
                raise TimeoutError(f"{text!r} did not appear")
        return time.perf_counter() - self.started

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> None:
        """Ask the program to quit, then make sure."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                break
            deadline = time.perf_counter() + 5
            while time.perf_counter() < deadline:
                self.pump(0.02)
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    os.close(self.master)
                    return
