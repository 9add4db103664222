"""Tokens at a reading pace: how many are due by now. Replays play by it, live runs can.

Holds no timer; the screen's clock asks.
"""

from __future__ import annotations

from collections import deque

RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # tokens a second
BASE = 8.0  # 1× of a replay
FULL: float | None = None  # as fast as the engine goes


class Meter:
    """Tokens a second over the last moments, from counts that are looked at now and then."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, now: float, count: int) -> float:
        """Note that there are `count` tokens at `now`; 0 until there is something to say."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._seconds:
            self._seen.popleft()
        began, first = self._seen[0]
        return (count - first) / (now - began) if now > began else 0.0


class Pace:
    """`rate` None: not held back."""

    def __init__(self, rate: float | None = FULL) -> None:
        self.rate = rate
        self._last: float | None = None
        self._owed = 0.0

    @property
    def speed(self) -> float:
        return (self.rate or RATES[-1]) / BASE

    def change(self, direction: int, can_be_full: bool) -> None:
        """One step slower (-1) or faster (1); past the fastest comes full speed."""
        steps: tuple[float | None, ...] = (*RATES, FULL) if can_be_full else RATES
        nearest = steps.index(self.rate) if self.rate in steps else len(RATES) - 1
        self.rate = steps[max(0, min(len(steps) - 1, nearest + direction))]
        self.rest()

    def due(self, now: float) -> int:
        """Tokens due since the last call, at `now` seconds; never more than a second's worth."""
        last, self._last = self._last, now
        if last is None or self.rate is None:
            return 0
        self._owed += min(1.0, max(0.0, now - last)) * self.rate
        tokens = int(self._owed)
        self._owed -= tokens
        return tokens

    def rest(self) -> None:
        """Nothing falls due while nobody plays."""
        self._last, self._owed = None, 0.0
