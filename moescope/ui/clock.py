"""How often the screen draws: 15 times a second, 8 where it shares few cores with an engine, fewer
when it cannot keep up or nobody looks.

Counts beats, holds no timer and reads no clock itself.
"""

from __future__ import annotations

RATES = (15.0, 8.0, 4.0)
FEW_CORES, FEW_RATES = 4, (8.0, 6.0, 4.0)
AWAY = 2.0  # when the terminal has lost the focus: still alive in a window beside
LATE = 1.5  # periods
LATE_BEATS, GOOD_BEATS = 5, 150


class Clock:
    """`beat` once a tick; `rate` is what the timer should run at now."""

    def __init__(self, cores: int = FEW_CORES + 1) -> None:
        self.rates = RATES if cores > FEW_CORES else FEW_RATES
        self.away = False
        self.measured = 0.0  # beats a second, smoothed
        self._step = 0
        self._late = 0
        self._good = 0
        self._last: float | None = None

    @property
    def rate(self) -> float:
        return AWAY if self.away else self.rates[self._step]

    def beat(self, now: float) -> bool:
        """Note a tick at `now` seconds; True when `rate` changed."""
        last, self._last = self._last, now
        if last is None or now <= last:
            return False
        gap, before = now - last, self.rate
        self.measured += 0.2 * (1 / gap - self.measured)
        if self.away:
            return False
        if gap > LATE / before:
            self._late, self._good = self._late + 1, 0
        else:
            self._late, self._good = 0, self._good + 1
        if self._late >= LATE_BEATS and self._step < len(self.rates) - 1:
            self._step, self._late = self._step + 1, 0
        elif self._good >= GOOD_BEATS and self._step > 0:
            self._step, self._good = self._step - 1, 0
        return self.rate != before

    def rest(self) -> None:
        """The timer stood still on purpose: the next gap says nothing."""
        self._last = None
