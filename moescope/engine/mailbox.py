"""The two ends of an engine's pipe: commands wait in an `Inbox`, events leave through an `Outbox`.

The engine's loop touches neither pipe nor clock: it takes what is in the inbox and puts into the
outbox, and neither ever makes it wait. Of the newest frames only the last unread is kept; all else
is delivered in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from moescope.engine.protocol import Close, Command, Event, Loading, Newest


class Inbox:
    """Commands in the order they came. Reentrant, so that a signal handler may close it."""

    def __init__(self) -> None:
        self._commands: deque[Command] = deque()
        self._changed = threading.Condition()
        self.closing = False  # `Close` was sent, or nobody is there any more

    def put(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self.closing = self.closing or isinstance(command, Close)
            self._changed.notify_all()

    def close(self) -> None:
        """The other side is gone."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()

    def take(self, wait: bool) -> list[Command]:
        """What came since the last call; with `wait`, at least one command or the end."""
        if not wait and not self._commands:
            return []
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._commands or self.closing)
            taken = list(self._commands)
            self._commands.clear()
            return taken


class Outbox:
    """Sends from its own thread. `send` may block for as long as the reader does not read."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._events: deque[Event] = deque()
        self._newest: Newest | None = None
        self._may_send_newest = True  # one is on its way at most
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queue an event. Progress replaces progress that was not sent yet."""
        with self._changed:
            last = self._events[-1] if self._events else None
            if isinstance(event, Loading) and isinstance(last, Loading):
                self._events.pop()
            self._events.append(event)
            self._changed.notify_all()

    def newest(self, event: Newest) -> None:
        """Replace the newest frames if unread; texts of ids are never lost."""
        with self._changed:
            if self._newest is not None and self._newest.pieces:
                event = replace(event, pieces=(*self._newest.pieces, *event.pieces))
            self._newest = event
            if self._may_send_newest:  # else the sender would wake for nothing, once a token
                self._changed.notify_all()

    def credit(self) -> None:
        """The reader has seen the newest frames: others may follow."""
        with self._changed:
            self._may_send_newest = True
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Send what waits (of the newest frames, also without credit), then end the thread."""
        with self._changed:
            self._ending = self._may_send_newest = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (event := self._next()) is not None:
                self._send(event)
        except (OSError, ValueError):  # nobody reads any more
            pass

    def _next(self) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._sendable() or self._ending)
            if self._events:
                return self._events.popleft()
            if self._sendable():
                newest, self._newest = self._newest, None
                self._may_send_newest = False
                return newest
            return None

    def _sendable(self) -> bool:
        return self._newest is not None and self._may_send_newest
