"""The process the user starts: runs headless commands itself, and watches over the screen.

A screen that dies by a signal cannot put the terminal back. So it runs in a forked child, and this
process, which imports nothing but the standard library, repairs the terminal when the child ends
badly, says what happened in one line, and passes on the exit code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

# Leave the alternate screen; show the cursor; turn off mouse reports, focus reports, bracketed
# paste, in-band resize reports and the kitty keyboard; end synchronised output; reset colours.
REPAIR = (
    "\x1b[?2026l\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l"
    "\x1b[?1004l\x1b[?2004l\x1b[?2048l\x1b[<u\x1b[0m\r"
)
FORWARDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def main(argv: list[str] | None = None) -> int:
    """Run one `moescope` command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    from moescope import cli

    code = _run(cli, arguments)
    # All is written and closed: Ctrl-C now could only show how the interpreter ends.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def _run(cli: Any, arguments: list[str]) -> int:
    supervised = cli.opens_a_screen(arguments) and hasattr(os, "fork") and sys.stderr.isatty()
    return watch(lambda: cli.run(arguments)) if supervised else cli.run(arguments)


def watch(work: Any) -> int:
    """Run `work() -> int` in a forked child; repair the terminal if a signal ends it."""
    terminal = _Terminal()
    # Held back until there is somebody to forward them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os._exit(_run_child(work))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    # Ctrl-C is the screen's to understand; ours would leave it without a parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    status = _wait(child)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) <= 128:
        return os.WEXITSTATUS(status)
    terminal.repair()
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    cause = signal.Signals(number).name
    sys.stderr.write(
        f"moescope: the screen was ended by {cause}; the terminal is restored\n"
        "Try: moescope (a recording that was not saved is offered again)\n"
    )
    return 128 + number


def _run_child(work: Any) -> int:
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def _kill(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _wait(child: int) -> int:
    """Wait for the child to end; when it is stopped (Ctrl-Z), stop with it and wake it after."""
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
        os.kill(os.getpid(), signal.SIGSTOP)
        _kill(child, signal.SIGCONT)


class _Terminal:
    """The terminal's modes as they were before the screen took it."""

    def __init__(self) -> None:
        self.saved: tuple[int, list[Any]] | None = None
        try:
            import termios

            fd = sys.stdin.fileno()
            self.saved = (fd, termios.tcgetattr(fd))
        except (ImportError, OSError, ValueError):
            pass
        except Exception as error:  # termios.error is no OSError
            if type(error).__name__ != "error":
                raise

    def repair(self) -> None:
        try:
            if self.saved is not None:
                import termios

                termios.tcsetattr(self.saved[0], termios.TCSANOW, self.saved[1])
            sys.stderr.write(REPAIR)
            sys.stderr.flush()
        except Exception:
            pass  # the terminal itself is gone


if __name__ == "__main__":
    sys.exit(main())
