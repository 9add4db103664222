"""What a session records: the meta of a trace, the recorder it talks to, and unsaved runs.

Without a file of the user's, a run is recorded into a private one in the state folder (mode 0600,
at most 2 GiB, oldest logits dropped first), deleted on a clean exit, and offered again after a
crash. The bytes on disk are the trace store's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moescope import reports
from moescope.engine.interpreter import Router
from moescope.engine.protocol import LoadRequest, Note
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.frames import Frame, RecordLevel, RouterInfo, TraceEvent, TraceMeta
from moescope.trace.record import Arrays

LIMIT_BYTES = 2 << 30  # of an unsaved run
PIECES = 64  # texts of new ids written as one event
PIECES_FRAMES = 16  # and no later than this many frames after the first of them
SUFFIX = ".moetrace"


def trace_meta(
    model: Any,
    tokenizer: Any = None,
    *,
    record: RecordLevel = "weights",
    redact: bool = False,
    sampling: dict[str, Any] | None = None,
) -> TraceMeta:
    """The meta of what a loaded model records. `model` is a `LoadedModel`, or two beside each
    other."""
    from moescope import __version__

    if hasattr(model, "second"):
        from moescope.engine.beside import meta_of_both

        common = {"record": record, "redact": redact, "sampling": sampling}
        first = trace_meta(model.first, tokenizer, **common)  # type: ignore[arg-type]
        return meta_of_both(first, trace_meta(model.second, None, **common))  # type: ignore[arg-type]

    interpreter, facts = model.interpreter, model.facts
    checkpoint = getattr(model, "checkpoint", None)
    described = {
        "name": facts.get("name", ""),
        "family": facts.get("family", ""),
        "model_type": facts.get("model_type", ""),
        "vocab_size": interpreter.vocab_size,
        "config_hash": getattr(checkpoint, "config_hash", None),
        "weights_hash": getattr(checkpoint, "weights_hash", None),
        "tokenizer_hash": getattr(tokenizer, "hash", None)
        or getattr(checkpoint, "tokenizer_hash", None),
    }
    engine = {
        "name": "moescope",
        "version": __version__,
        "device": interpreter.device,
        "dtype": interpreter.dtype,
        "quantisation": getattr(checkpoint, "quantisation", None),
        "kernels": dict(interpreter.kernels),
    }
    return TraceMeta(
        models=(described,),
        routers=tuple(_router_info(router) for router in interpreter.routers),
        router_tensors={
            index: {name: np.asarray(array, np.float32) for name, array in router.tensors.items()}
            for index, router in enumerate(interpreter.routers)
            if router.tensors
        },
        record=record,
        engine=engine,
        sampling=sampling or {},
        redacted=redact,
    )


def _router_info(router: Router) -> RouterInfo:
    wiring = router.spec.wiring
    return RouterInfo(
        layer=router.layer,
        num_experts=wiring.num_experts,
        num_null_experts=wiring.num_null_experts,
        num_experts_per_tok=router.spec.policy.num_experts_per_tok,
        spec=router.spec.to_json(),
        site=router.site,
        kind="hash" if wiring.hash_table else "learned",
    )


def check_place(path: Path, force: bool = False) -> None:
    """Refuse a file that could not be recorded into before a model is loaded for it."""
    try:
        exists, missing = path.exists(), not path.parent.is_dir()
        special = exists and not path.is_file()
        taken = exists and not force and path.stat().st_size > 0
    except OSError as error:
        raise MoescopeError(
            f"{single_line(str(path))}: {error.strerror}", code=ExitCode.OUTPUT
        ) from None
    for wrong, problem, hint in (
        (missing, "the folder does not exist", "another name"),
        (special, f"is {'a folder' if path.is_dir() else 'no regular file'}", "another name"),
        (taken, "already exists", "another name, or --force to replace it"),
    ):
        if wrong:
            shown = f"{single_line(str(path))}: {problem}"
            raise MoescopeError(shown, hint=hint, code=ExitCode.OUTPUT)


def open_writer(request: LoadRequest, meta: TraceMeta, private: bool) -> Any:
    """The `TraceWriter` a request asks for; None where it names no file."""
    if request.trace_path is None:
        return None
    from moescope.trace.store import TraceWriter

    return TraceWriter(
        request.trace_path,
        meta,
        durable=request.durable,
        limit_bytes=LIMIT_BYTES if private else None,
        force=request.force,
    )


class Recorder:
    """A `TraceWriter` that may be missing, or stop, without stopping the generation.

    Every call returns a note for the user where there is something to say.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.failure: MoescopeError | None = None
        self._last = 0  # acknowledged when the writer stopped
        self._dropped = 0
        self._frames: list[tuple[Frame, Arrays | None]] = []  # of this step
        self._pieces: dict[int, str] = {}
        self._waiting = 0  # frames since the first piece that is not written

    @property
    def acknowledged(self) -> int:
        """Frames that are safe in the trace."""
        return self._last if self.writer is None else int(self.writer.acknowledged)

    def frame(self, frame: Frame, arrays: Arrays | None = None) -> None:
        """A frame of this step, `arrays` as for `trace.record`; it is written with the next `send`
        or event."""
        if self.writer is not None:
            self._frames.append((frame, arrays))

    def send(self) -> Note | None:
        """Write the frames of a step, all at once."""
        if self.writer is None or not self._frames:
            return None
        frames, self._frames = self._frames, []
        note = self._call("extend", frames)
        self._waiting += len(frames) * bool(self._pieces)
        if self._waiting >= PIECES_FRAMES or len(self._pieces) >= PIECES:
            note = self._write_pieces() or note
        return note or self._dropped_since()

    def event(self, event: TraceEvent) -> Note | None:
        if self.writer is None:
            return None
        return self.send() or self._write_pieces() or self._call("event", event)

    def pieces(self, fresh: Mapping[int, str]) -> None:
        """Texts of ids seen for the first time; written with some later frame or event."""
        if self.writer is not None:
            self._pieces.update(fresh)

    def close(self) -> Note | None:
        if self.writer is None:
            return None
        note = self.send() or self._write_pieces() or self._call("close") or self._dropped_since()
        self._last, self.writer = self.acknowledged, None
        return note

    def _dropped_since(self) -> Note | None:
        dropped = int(getattr(self.writer, "dropped_logits", 0))
        if dropped <= self._dropped:
            return None
        self._dropped = dropped
        return Note(
            f"the recording is at its limit: logits of the first {dropped:,} tokens dropped",
            "warning",
        )

    def _write_pieces(self) -> Note | None:
        if not self._pieces:
            return None
        texts = {str(token): text for token, text in self._pieces.items()}
        self._pieces, self._waiting = {}, 0
        return self._call("event", TraceEvent("pieces", {"pieces": texts}))

    def _call(self, name: str, *arguments: Any) -> Note | None:
        if self.writer is None:
            return None
        try:
            getattr(self.writer, name)(*arguments)
        except MoescopeError as error:
            if error.code != ExitCode.OUTPUT:
                raise
            self.failure = error
            self._last, writer, self.writer = self.acknowledged, self.writer, None
            if name != "close":
                writer.close()
            return Note(error.message, "error")
        return None


# --- unsaved runs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A run that nobody saved and nobody is writing or looking at."""

    path: Path
    bytes: int
    modified: float  # seconds since the epoch


@dataclass(slots=True)
class PrivateRun:
    """The file of a run that was not given one. Held by this process until `discard` or its end."""

    path: Path
    lock: int | None

    def discard(self) -> None:
        """Delete the run. Doing it twice changes nothing."""
        remove(self.path)
        self.release()

    def release(self) -> None:
        """Let go of the run without deleting it: it is offered again."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def new_private_run() -> PrivateRun:
    """An empty private file to record into. Raises `MoescopeError` (OUTPUT)."""
    runs = _folder()
    try:
        runs.mkdir(parents=True, exist_ok=True, mode=0o700)
        for attempt in range(100):
            stamp = time.strftime("%Y%m%d-%H%M%S")
            path = runs / f"{stamp}-{os.getpid()}-{attempt}{SUFFIX}"
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                continue
            return PrivateRun(path, _hold(_lock_path(path)))
    except OSError as error:
        raise MoescopeError(
            f"{single_line(str(runs))}: cannot be written: {error.strerror}",
            hint="MOESCOPE_STATE=another/folder, or -o FILE",
            code=ExitCode.OUTPUT,
        ) from None
    raise MoescopeError(
        f"{single_line(str(runs))}: no free name for a recording", code=ExitCode.OUTPUT
    )


def recoverable() -> list[Unsaved]:
    """Unsaved runs of processes that are gone, newest first. Empty ones are removed."""
    from moescope.trace.database import wal_path
    from moescope.trace.lock import writer_of

    found = []
    for path in sorted(_folder().glob(f"*{SUFFIX}")):
        try:
            held = _hold(_lock_path(path), create=False)
            if held == _TAKEN or writer_of(path) is not None:
                continue
            if held is not None:
                os.close(held)
            parts = [part.stat() for part in (path, wal_path(path)) if part.exists()]
        except OSError:
            continue
        if size := sum(part.st_size for part in parts):
            found.append(Unsaved(path, size, max(part.st_mtime for part in parts)))
        else:
            remove(path)
    return sorted(found, key=lambda run: run.modified, reverse=True)


def remove(path: Path) -> None:
    """Delete an unsaved run with everything beside it."""
    for suffix in ("", "-wal", "-shm", "-journal", ".lock"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _folder() -> Path:
    return reports.folder() / "runs"


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


_TAKEN = -1


def _hold(path: Path, create: bool = True) -> int | None:
    """A lock the system releases when this process dies; `_TAKEN` where another has it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing tells who is alive
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return _TAKEN
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor
