"""Links: one engine as a screen sees it. In a child process, in a recorded file, or in a test.

All speak the words of `protocol.py`. Nothing here loads a model; the child does (`worker.py`). It
may be started before the terminal is taken, or later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moescope.engine import worker
from moescope.engine.mailbox import Inbox, Outbox
from moescope.engine.protocol import (
    Close,
    Command,
    Event,
    Failed,
    Finished,
    Link,
    Loaded,
    LoadRequest,
    Newest,
)
from moescope.engine.recording import PrivateRun, new_private_run
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.frames import TraceMeta

LAST_WORDS = 1.0  # seconds between asking a child to end, telling it, and killing it


def start(request: LoadRequest, *, loader: str = worker.LOADER) -> Link:
    """An engine in a child process. Without `trace_path` it records into a private file, deleted
    when the link is closed. `loader` is where the child finds the function that loads a model.

    Raises `MoescopeError` (OUTPUT) where there can be no private file, (RESOURCES) where no process
    can be started.
    """
    private = new_private_run() if request.trace_path is None else None
    if private is not None:
        request = replace(request, trace_path=str(private.path))
    try:
        return _Child(request, private, loader)
    except OSError as error:
        if private is not None:
            private.discard()
        message = f"the engine's process cannot be started: {error.strerror or error}"
        raise MoescopeError(message, code=ExitCode.RESOURCES) from None


class _Arrivals:
    """Events as they arrive in another thread, and what every `poll` has in common."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._trace_path: Path | None = None
        self._over = False  # a fatal failure was handed out

    def add(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events: list[Event] = []
        while self._events and not self._over:
            event = self._events.popleft()
            if isinstance(event, Loaded):
                self._trace_path = Path(event.trace_path) if event.trace_path else None
            if isinstance(event, Newest):
                for older in [e for e in events if isinstance(e, Newest)]:
                    events.remove(older)
                    event = replace(event, pieces=(*older.pieces, *event.pieces))
            self._over = isinstance(event, Failed) and event.fatal
            events.append(event)
        return events

    @property
    def trace_path(self) -> Path | None:
        return self._trace_path


class _Child:
    """The engine's process, and a thread of ours that reads what it says."""

    def __init__(self, request: LoadRequest, private: PrivateRun | None, loader: str) -> None:
        self._private = private
        self._log = worker.new_log()
        self._arrivals = _Arrivals()
        self._closing = False
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main,
            args=(theirs, request, private is not None, self._log, loader),
            name="moescope-engine",
            daemon=True,
        )
        # Textual's stderr has no file number, which starting a process asks for.
        with contextlib.redirect_stderr(sys.__stderr__):
            self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def trace_path(self) -> Path | None:
        return self._arrivals.trace_path

    def send(self, command: Command) -> None:
        self._say(command)

    def poll(self) -> list[Event]:
        events = self._arrivals.take()
        if any(isinstance(event, Newest) for event in events):
            self._say(worker.CREDIT)
        return events

    def close(self, timeout: float = 5.0) -> None:
        if self._closing:
            return
        self._closing = True
        self._say(Close())
        self._reader.join(timeout)
        for end in (self._process.terminate, self._process.kill):
            if self._reader.is_alive():
                end()
                self._reader.join(LAST_WORDS)
        self._connection.close()
        if self._private is not None:
            self._private.discard()

    def _say(self, word: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone; `poll` says so
            self._connection.send(word)

    def _read(self) -> None:
        try:
            while True:
                self._arrivals.add(_receive(self._connection))
        except (EOFError, OSError):
            self._process.join(worker.GRACE)
            if not self._closing:
                self._arrivals.add(_died(self._process.exitcode, self._log))


def _receive(connection: Connection) -> Event:
    event: Event = connection.recv()
    return event


def _died(code: int | None, log: str) -> Failed:
    """How a child ended that was not asked to. It follows the failure the child told, if any."""
    hint = "open the model again" + (f"; its log is {single_line(log)}" if log else "")
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
        message = f"the engine died: signal {-code} {name}".rstrip()
        if -code == getattr(signal, "SIGKILL", 9):
            hint = f"more memory, a smaller --max-context or --dtype bfloat16; {hint}"
            return Failed(message, hint, int(ExitCode.RESOURCES))
        return Failed(message, hint, int(ExitCode.BUG))
    ended = "stopped answering" if code is None else f"ended by itself with code {code}"
    return Failed(f"the engine {ended}", hint, int(ExitCode.BUG))


class InProcess:
    """The engine in a thread of this process: for debugging, and for tests that want no process."""

    def __init__(self, request: LoadRequest, *, loader: str = worker.LOADER) -> None:
        self._arrivals, self._inbox = _Arrivals(), Inbox()
        self._outbox = Outbox(self._arrivals.add)
        self._thread = threading.Thread(
            target=worker.serve,
            args=(request, self._inbox, self._outbox),
            kwargs={"loader": loader},
            name="engine",
            daemon=True,
        )
        self._thread.start()

    @property
    def trace_path(self) -> Path | None:
        return self._arrivals.trace_path

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def poll(self) -> list[Event]:
        events = self._arrivals.take()
        if any(isinstance(event, Newest) for event in events):
            self._outbox.credit()
        return events

    def close(self, timeout: float = 5.0) -> None:
        self._inbox.put(Close())
        self._thread.join(timeout)
        self._outbox.close(timeout)


class Scripted:
    """A test double: hands out one item of `script` a poll (an event, or several at once) and keeps
    what it was told in `sent`."""

    def __init__(
        self, script: Iterable[Event | Iterable[Event]] = (), trace_path: Path | None = None
    ) -> None:
        self._script: deque[Event | Iterable[Event]] = deque(script)
        self._arrivals = _Arrivals()
        self._given_path = trace_path
        self.sent: list[Command] = []
        self.closed = False

    @property
    def trace_path(self) -> Path | None:
        return self._given_path or self._arrivals.trace_path

    def push(self, *events: Event) -> None:
        """Add events for the next poll that has nothing else to hand out."""
        self._script.append(events)

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def poll(self) -> list[Event]:
        if not self._script:
            return []
        item = self._script.popleft()
        for event in item if isinstance(item, Iterable) else (item,):
            self._arrivals.add(event)
        return self._arrivals.take()

    def close(self, timeout: float = 5.0) -> None:
        del timeout
        self.closed = True


# --- a recorded file ------------------------------------------------------------------------------


def replay(path: str | Path) -> Link:
    """A recorded trace as a link: what made it, and how its lanes ended. The screen reads the
    frames itself. Raises `MoescopeError` (TRACE) where it is no trace."""
    return _Replay(Path(path))


class _Replay(Scripted):
    """Plays nothing by itself; commands that need an engine are answered with a failure."""

    def __init__(self, path: Path) -> None:
        from moescope.trace.store import TraceReader

        with contextlib.closing(TraceReader.open(path)) as reader:
            facts = facts_of(reader.meta, path.name)
            ends = [
                Finished(event.lane, event.position, str(event.data.get("reason", "stopped")))
                for event in reader.events()
                if event.kind == "finished"
            ]
            loaded = Loaded(facts, reader.meta, str(path))
        super().__init__([[loaded, *ends]], path)

    def send(self, command: Command) -> None:
        super().send(command)
        if not isinstance(command, Close):
            self.push(
                Failed(
                    "a recording cannot generate",
                    "open a model to run it; o opens another file",
                    int(ExitCode.USAGE),
                    fatal=False,
                )
            )


def facts_of(meta: TraceMeta, name: str) -> dict[str, Any]:
    """What `Loaded.facts` says of a recorded model, as far as the recording tells."""
    model: dict[str, Any] = meta.models[0] if meta.models else {}
    return {
        "name": str(model.get("name") or name),
        "family": str(model.get("family") or "unknown"),
        "model_type": str(model.get("model_type") or "unknown"),
        "num_routers": len(meta.routers),
        "device": str(meta.engine.get("device", "unknown")),
        "dtype": str(meta.engine.get("dtype", "unknown")),
        "kernels": meta.engine.get("kernels", {}),
        "vocab_size": model.get("vocab_size"),
        "has_chat_template": False,
        "notes": ["token ids and text were not recorded"] if meta.redacted else [],
    }
