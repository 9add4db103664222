"""The engine's loop: commands between tokens, frames to the trace, the newest ones to the screen.

`main` is what runs in the child process, `serve` the same without a process. Nothing heavy is
imported before the child needs it, and no error leaves here: it becomes a `Failed`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from moescope import reports
from moescope.engine import recording
from moescope.engine.failures import failure, out_of_memory
from moescope.engine.mailbox import Inbox, Outbox
from moescope.engine.protocol import (
    AddLane,
    Close,
    Command,
    DropLane,
    Failed,
    Generate,
    Loaded,
    Loading,
    LoadRequest,
    Newest,
    Pause,
    Resume,
    SameTokens,
    SetVariant,
    SlowRouter,
    Step,
    Stop,
)
from moescope.errors import ExitCode, MoescopeError

LOADER = "moescope.engine.opening:open_model"  # (request, progress) -> model, tokenizer
CREDIT = "credit"  # the one word on the pipe that is no command: the newest frames were read
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
GRACE = 10.0  # seconds to commit once nobody is there; what is acknowledged is safe anyway
RATE_WINDOW = 2.0  # seconds that tokens per second are measured over


class Gone(BaseException):
    """The screen went away while a model was loading. No `Exception`: nobody shall catch it."""


def main(
    connection: Connection, request: LoadRequest, private: bool, log: str, loader: str
) -> None:
    """The child process. Ends when told to, or when the pipe closes; commits the trace first."""
    _become_quiet(log)
    inbox = Inbox()
    outbox = Outbox(connection.send)
    done = threading.Event()
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, lambda *_: inbox.close())
    listener = (connection, inbox, outbox, done)
    threading.Thread(target=_listen, args=listener, name="inbox", daemon=True).start()
    serve(request, inbox, outbox, private=private, loader=loader)
    outbox.close(timeout=GRACE)
    done.set()
    connection.close()


def _become_quiet(log: str) -> None:
    """What libraries print goes to the log; the terminal belongs to the screen, and so does ^C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log or os.devnull, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    faulthandler.enable(file=2, all_threads=True)
    os.environ.update(OFFLINE)


def _listen(connection: Connection, inbox: Inbox, outbox: Outbox, done: threading.Event) -> None:
    try:
        while True:
            word = connection.recv()
            outbox.credit() if word == CREDIT else inbox.put(word)
    except (EOFError, OSError):
        inbox.close()
    if not done.wait(GRACE):  # stuck in a native call
        os._exit(int(ExitCode.BUG))


def serve(
    request: LoadRequest,
    inbox: Inbox,
    outbox: Outbox,
    *,
    private: bool = False,
    loader: str = LOADER,
) -> None:
    """Load, then obey until the end. Whatever goes wrong becomes an event."""
    engine: Engine | None = None
    failed: Failed | None = None
    try:
        engine = _open(request, inbox, outbox, private, loader)
        engine.run()
    except Gone:
        pass
    except BaseException as error:
        failed = failure(error, engine.token if engine else None)
    if engine is not None:
        try:
            engine.end()
        except BaseException as error:
            failed = failed or failure(error, engine.token if engine else None)
    if failed is not None:
        outbox.put(failed)


def _open(request: LoadRequest, inbox: Inbox, outbox: Outbox, private: bool, loader: str) -> Engine:
    def progress(loading: Loading) -> None:
        if inbox.closing:
            raise Gone
        outbox.put(loading)

    if request.trace_path is not None:
        recording.check_place(Path(request.trace_path), request.force)
    module, _, name = loader.partition(":")
    load: Callable[..., Any] = getattr(importlib.import_module(module), name)
    model, tokenizer = load(request, progress)

    from moescope.engine.session import Session

    meta = recording.trace_meta(model, tokenizer, record=request.record, redact=request.redact)
    writer = recording.open_writer(request, meta, private)
    session = Session(
        model, tokenizer, writer, record=request.record, max_context=request.max_context
    )
    session.take_events()  # of the lane every session begins with
    outbox.put(Loaded(dict(model.facts), meta, request.trace_path))
    return Engine(session, inbox, outbox)


class Engine:
    """A session under command. Paused, it takes the steps it was granted and waits."""

    def __init__(self, session: Any, inbox: Inbox, outbox: Outbox) -> None:
        self.session, self.inbox, self.outbox = session, inbox, outbox
        self.paused = False
        self.steps = 0  # granted while paused
        self.prefill_first = False  # a prompt is fed also while paused
        self.rate = Rate()
        self._obey: dict[type, Callable[[Any], None]] = {
            Generate: self._generate,
            Pause: lambda _: self._pause(True),
            Resume: lambda _: self._pause(False),
            Step: self._step,
            SetVariant: lambda c: session.set_variant(c.lane, c.expression),
            AddLane: lambda c: session.add_lane(c.expression, c.fork_of, c.position, c.model),
            DropLane: lambda c: session.drop_lane(c.lane),
            SameTokens: lambda c: setattr(session, "same_tokens", c.on),
            SlowRouter: lambda c: session.set_slow_router(c.on),
            Stop: lambda _: session.stop(),
        }

    @property
    def active(self) -> bool:
        """Whether there is a token to compute now."""
        if not self.session.running:
            return False
        prefill = self.prefill_first and self.session.prefilling
        return not self.paused or self.steps > 0 or prefill

    @property
    def state(self) -> Literal["idle", "prefill", "running", "paused"]:
        if not self.session.running:
            return "idle"
        if self.session.prefilling and self.active:
            return "prefill"
        return "running" if self.active else "paused"

    @property
    def token(self) -> int:
        """The position that is computed next, of the lane that is furthest."""
        return max((f.position for f in self.session.newest.values()), default=-1) + 1

    def run(self) -> None:
        """Until `Close`, or until nobody is there."""
        while True:
            commands = self.inbox.take(wait=not self.active)
            for command in commands:
                if isinstance(command, Close):
                    return
                self.obey(command)
            if self.inbox.closing and not commands:
                return
            if commands:
                self.tell()
            if self.active:
                self.advance()

    def obey(self, command: Command) -> None:
        """Do one command; what cannot be done is told, and changes nothing."""
        try:
            self._obey[type(command)](command)
        except MoescopeError as error:
            self.outbox.put(Failed(error.message, error.hint, int(error.code), fatal=False))
        except Exception as error:
            if not out_of_memory(error):
                raise
            failed = failure(error, self.token)
            self.outbox.put(Failed(failed.message, failed.hint, failed.code, fatal=False))

    def advance(self) -> None:
        """One batch of tokens."""
        prefill = self.session.prefilling
        frames = self.session.step()
        self.rate.add(len(frames), time.monotonic())
        if self.paused and not prefill:
            self.steps = max(0, self.steps - 1)
        if not self.session.running:
            self.steps = 0
        self.tell()

    def tell(self) -> None:
        for event in self.session.take_events():
            self.outbox.put(event)
        running = self.active
        self.outbox.newest(
            Newest(
                frames=tuple(self.session.newest[lane] for lane in sorted(self.session.newest)),
                recorded=self.session.recorder.acknowledged,
                state=self.state,
                tokens_per_second=self.rate.now(time.monotonic()) if running else 0.0,
                pieces=self.session.take_pieces(),
                router=self.session.router_says,
            )
        )

    def end(self) -> None:
        """Commit the trace, and tell what is left to tell."""
        self.session.close()
        self.tell()

    def _generate(self, command: Generate) -> None:
        self.session.start(command)
        self.paused, self.steps = command.paused, 0
        self.prefill_first = True
        self.rate = Rate()

    def _pause(self, paused: bool) -> None:
        self.paused, self.steps, self.prefill_first = paused, 0, False
        self.rate = Rate()

    def _step(self, command: Step) -> None:
        if not self.paused:
            self._pause(True)
        self.steps += max(1, command.n)


class Rate:
    """Tokens per second over the last seconds. A gap starts the measurement anew."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, tokens: int, now: float) -> None:
        if self._seen and now - self._seen[-1][0] > RATE_WINDOW:
            self._seen.clear()
        self._seen.append((now, tokens))
        while now - self._seen[0][0] > RATE_WINDOW:
            self._seen.popleft()

    def now(self, now: float) -> float:
        """0 until two batches were seen. Tokens of the first batch came before its time."""
        if len(self._seen) < 2:
            return 0.0
        span = self._seen[-1][0] - self._seen[0][0]
        return sum(tokens for _, tokens in list(self._seen)[1:]) / span if span > 0 else 0.0


def new_log() -> str:
    """An empty log for one engine; the newest ten are kept. "" where none can be written."""
    logs = reports.folder() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = logs / f"engine-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        for old in sorted(logs.glob("engine-*.log"))[:-10]:
            with contextlib.suppress(OSError):
                old.unlink()
    except OSError:
        return ""
    return str(path)
