"""What the embedded demo model does when nobody asks it anything: one prompt of each domain.

The next one begins a moment after the last has ended, until a key is pressed. Holds no timer.
"""

from __future__ import annotations

PROMPTS = (
    "Once upon a time, Jonas lived in a house at the edge of the forest.",
    "JSON, users, one a line:\n",
    "def sum_apples(apples):\n",
    "Each sum begins where the last one ended:\n",
    "Shopping list for Kira:\n",
    "Counting in German by twos:\n",
)
REST = 2.5  # seconds to read the end


class Tour:
    """`next` is asked once a tick."""

    def __init__(self) -> None:
        self._asked = 0
        self._rested: float | None = None

    def next(self, now: float, resting: bool) -> str | None:
        """The prompt to begin with now, if any. `resting`: nothing is being generated."""
        if not resting:
            self._rested = None
            return None
        if self._rested is None:
            self._rested = now
        over = self._asked == 0 or now - self._rested >= REST
        if not over or self._asked >= len(PROMPTS):
            return None
        self._asked, self._rested = self._asked + 1, None
        return PROMPTS[self._asked - 1]
