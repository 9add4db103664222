"""What the verbs that run a model share: loading with progress, a session, and tidy endings."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moescope.commands import options
from moescope.engine.protocol import Event, Finished, Loading, Note
from moescope.errors import ExitCode

PROGRESS_S = 0.1


class Ended(SystemExit):
    """A signal asked us to end; unwinds like SystemExit, so that traces are committed."""


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The request, the model, and its tokenizer (None where there is none that can be used)."""
    from moescope.engine.opening import open_model
    from moescope.engine.recording import check_place

    recording = (
        {name: getattr(args, name) for name in ("record", "redact", "durable", "force")}
        if getattr(args, "output", None)
        else {}
    )
    request = options.request_of(args, trace_path=getattr(args, "output", None), **recording)
    if request.trace_path is not None:
        check_place(Path(request.trace_path), request.force)
    progress = _Progress()
    try:
        model, tokenizer = open_model(request, progress.show)
    finally:
        progress.clear()
    for note in model.facts["notes"]:
        talk(note)
    return request, model, tokenizer


def ending(invalid: str, recording_stopped: bool) -> int:
    """The exit code of a run: what the model did says more than what the disk did."""
    if invalid:
        return int(ExitCode.FOUND)
    return int(ExitCode.OUTPUT if recording_stopped else ExitCode.DONE)


def talk(text: str) -> None:
    """One sentence on standard error."""
    sys.stderr.write(f"moescope: {options.plain(text)}\n")


def tell(events: Sequence[Event]) -> None:
    """Say what a person should know of what happened beside the tokens."""
    for event in events:
        if isinstance(event, Note):
            talk(event.text)
        elif isinstance(event, Finished) and event.reason == "context":
            talk(f"stopped at token {event.position}: the context is full (--max-context)")


@contextmanager
def signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind, so that what was recorded is committed; exit code 128 + n."""

    def end(number: int, _: Any) -> None:
        raise Ended(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def recording(args: argparse.Namespace, request: Any, model: Any, tokenizer: Any) -> Iterator[Any]:
    """A writer for `--output`, closed whatever happens; None where nothing is recorded."""
    from dataclasses import asdict

    from moescope.engine.recording import open_writer, trace_meta

    meta = trace_meta(
        model,
        tokenizer,
        record=request.record,
        redact=request.redact,
        sampling=asdict(options.sampling_of(args)),
    )
    with open_writer(request, meta, private=False) or nullcontext() as writer:
        yield writer


class _Progress:
    """One line on standard error, only where somebody is looking."""

    def __init__(self) -> None:
        self.shown = False
        self.last = 0.0

    def show(self, event: Loading) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self.last < PROGRESS_S:
            return
        self.last, self.shown = now, True
        share = f"{100 * event.done / event.total:3.0f} %" if event.total else ""
        text = f"{event.stage} {share} {event.what}"
        sys.stderr.write(f"\r{options.plain(text)[:78]:<78}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r" + " " * 78 + "\r")
            sys.stderr.flush()
