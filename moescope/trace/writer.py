"""`TraceWriter`: records frames and events into a `.moetrace` while a model runs.

The engine's thread calls `append` and goes on; one writer thread commits. A frame is acknowledged
when its insert is committed: at once while decoding, every 16 frames or 50 ms while prefilling.
The file is `output.py`'s, the bytes of a frame are made in `record.py`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.frames import DECODE, Frame, TraceEvent, TraceMeta
from moescope.trace.metadata import redact_event, router_groups
from moescope.trace.output import CHUNK_FRAMES, TraceOutput, event_row
from moescope.trace.record import Arrays, record

QUEUE_BYTES = 32 << 20  # waiting for the writer thread; when full, `append` waits
QUEUE_ITEMS = 512
PREFILL_FRAMES, PREFILL_S = 16, 0.050


class _Item(NamedTuple):
    """A frame as a record, or an event as (kind, JSON)."""

    blob: bytes
    is_decode: bool
    event: tuple[str, str] | None = None


class TraceWriter:
    """Writes one trace. `append` and `event` may be called from one thread at a time.

    `durable` syncs every commit to the disk (power loss; `kill -9` loses nothing either way).
    `limit_bytes` bounds the file: the oldest logits are dropped first, then recording stops.
    An existing file is not replaced without `force` (an empty one is filled, keeping its mode).
    Raises `MoescopeError` (OUTPUT) where the file cannot be written, (TRACE) where another process
    is writing it. As a context, it leaves no file where it fails before the first frame.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        durable: bool = False,
        limit_bytes: int | None = None,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self.meta = replace(meta, prompt_ids=None) if meta.redacted else meta
        self._shown = single_line(str(path))
        self._redact = meta.redacted
        self._router_counts = tuple(len(routers) for routers in router_groups(meta))
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._accepted = self._done = 0  # items
        self._appended = self._acknowledged = 0  # frames
        self._failure: MoescopeError | None = None
        self._told = False  # the failure was raised once
        self._closing = self._closed = False
        self._flushers = 0
        self._output = TraceOutput(
            self.path, self.meta, durable=durable, limit_bytes=limit_bytes, force=force
        )
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    # --- the caller's side ------------------------------------------------------------------------

    def append(self, frame: Frame) -> None:
        """Queue one frame; waits only when the queue is full. The arrays are copied.

        Raises ValueError for a frame that is not of the routers in the meta: nobody could read it.
        """
        self.extend([(frame, None)])

    def extend(self, frames: Iterable[tuple[Frame, Arrays | None]]) -> None:
        """Queue the frames of one step, which are committed together; see `append`, and `record`
        for what may stand beside a frame."""
        items = [self._item(frame, arrays) for frame, arrays in frames]
        for start in range(0, len(items), QUEUE_ITEMS // 2):
            self._put(items[start : start + QUEUE_ITEMS // 2])
        self._appended += len(items)

    def _item(self, frame: Frame, arrays: Arrays | None) -> _Item:
        routers = len(frame.expert_ids)
        if self._router_counts and routers not in self._router_counts:
            raise ValueError(f"a frame of {routers} routers, meta has {self._router_counts}")
        blob = record(frame, self.meta.record, self._redact, arrays)
        return _Item(blob, frame.phase == DECODE)

    def event(self, event: TraceEvent) -> None:
        """Queue an event; it keeps its place among the frames. TypeError if it is no JSON."""
        kept = redact_event(event) if self._redact else event
        if kept is not None:
            self._put([_Item(b"", True, event_row(kept, self._appended))])

    def flush(self) -> None:
        """Wait until everything appended so far is committed."""
        with self._changed:
            goal = self._accepted
            self._flushers += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= goal or self._failure is not None)
            self._flushers -= 1
            self._raise_failure()

    @property
    def acknowledged(self) -> int:
        """Frames committed: none of them is lost when the process is killed."""
        return self._acknowledged

    @property
    def dropped_logits(self) -> int:
        """Frames, the oldest, whose logits were dropped to stay within `limit_bytes`."""
        return self._output.dropped_logits

    def close(self) -> None:
        """Commit everything and fold the trace into one file. Doing it twice changes nothing.

        Raises the failure that stopped the recording, if no call raised it before.
        """
        if self._closed:
            return
        self._closed = True
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not self._told:
            self._raise_failure()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MoescopeError:
            if error is None:
                raise
        finally:
            if not self._acknowledged and (error is not None or self._failure is not None):
                self._output.discard()

    def _put(self, items: list[_Item]) -> None:
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._raise_failure()
            if self._closing:
                raise MoescopeError(f"{self._shown}: the trace is closed", code=ExitCode.OUTPUT)
            self._queue += items
            self._queued_bytes += sum(len(item.blob) for item in items)
            self._accepted += len(items)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        full = len(self._queue) >= QUEUE_ITEMS or self._queued_bytes >= QUEUE_BYTES
        return not full or self._failure is not None or self._closing

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._told = True
            raise self._failure

    # --- the writer thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while items := self._take():
                self._commit(items)
                self._output.fold()
            self._output.finish()
        except MoescopeError as failure:
            self._fail(failure)
        except (sqlite3.Error, OSError, MemoryError) as error:
            self._fail(self._output.stopped(error))
        except Exception as error:  # ours; an engine that waits for this thread shall not hang
            words = single_line(f"{type(error).__name__}: {error}", 200)
            message = f"{self._shown}: recording stopped: {words}"
            self._fail(MoescopeError(message, code=ExitCode.BUG))
        finally:
            self._output.close()

    def _take(self) -> list[_Item]:
        """The items of the next commit; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(self._commit_is_due, PREFILL_S)
            items: list[_Item] = []
            while self._queue and len(items) < CHUNK_FRAMES:
                items.append(self._queue.popleft())
                self._queued_bytes -= len(items[-1].blob)
            self._changed.notify_all()
            return items

    def _commit_is_due(self) -> bool:
        queue = self._queue
        if self._closing or self._flushers or len(queue) >= PREFILL_FRAMES:
            return True
        return bool(queue) and (queue[-1].is_decode or self._queued_bytes >= QUEUE_BYTES)

    def _commit(self, items: list[_Item]) -> None:
        frames = [item.blob for item in items if item.event is None]
        self._output.commit(frames, [item.event for item in items if item.event is not None])
        with self._changed:
            self._acknowledged += len(frames)
            self._done += len(items)
            self._changed.notify_all()

    def _fail(self, failure: MoescopeError) -> None:
        with self._changed:
            self._failure = failure
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
        self._output.abandon()
