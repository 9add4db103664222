"""Going back in a lane whose operators rewrite their state: what it was fed, and snapshots.

Attention forgets a token by forgetting its row of the cache; a recurrent state has to be restored
from a snapshot, and what was fed since then fed again, under what the lane then ran under. This
keeps both, bounded in bytes; the interpreter saves, restores and feeds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EVERY = 64  # tokens between snapshots while decoding
AT_ONCE = 128  # tokens fed again together
BYTES = 256 << 20  # of snapshots, for each lane


@dataclass(slots=True, eq=False)
class Past:
    """One lane's. `snapshots` holds what the interpreter saved, by the number of tokens fed before
    it; before the first token the state is that of a fresh lane, which needs none."""

    ids: list[int] = field(default_factory=list)
    # from a position on: the specs in force, and what was steered
    specs: list[tuple[int, Any]] = field(default_factory=list)
    snapshots: dict[int, Any] = field(default_factory=dict)

    def fed(self, ids: list[int], specs: Any) -> None:
        """`ids` were fed under `specs`."""
        if not self.specs or self.specs[-1][1] != specs:
            self.specs.append((len(self.ids), specs))
        self.ids += ids

    def wants_snapshot(self, fed: int) -> bool:
        """Whether to save now: after several tokens at once, and every so many single ones."""
        return fed > 1 or len(self.ids) - max(self.snapshots, default=0) >= EVERY

    def save(self, state: Any, size: int) -> None:
        """Keep a snapshot of `size` bytes; beyond the limit, the one is dropped that leaves the
        smallest gap."""
        self.snapshots[len(self.ids)] = state
        while len(self.snapshots) > max(2, BYTES // max(1, size)):
            places = [0, *sorted(self.snapshots)]
            gaps = {places[i]: places[i + 1] - places[i - 1] for i in range(1, len(places) - 1)}
            del self.snapshots[min(gaps, key=lambda place: gaps[place])]

    def nearest(self, length: int) -> int:
        """The last position not after `length` that can be restored."""
        return max((place for place in self.snapshots if place <= length), default=0)

    def spans(self, begin: int, end: int) -> Iterator[tuple[list[int], Any]]:
        """What was fed in [begin, end), in parts, with the specs each was fed under."""
        while begin < end:
            at = bisect_right([place for place, _ in self.specs], begin)
            change = self.specs[at][0] if at < len(self.specs) else end
            stop = min(end, change, begin + AT_ONCE)
            yield self.ids[begin:stop], self.specs[at - 1][1]
            begin = stop

    def cut(self, length: int) -> None:
        """Forget everything from `length` on."""
        del self.ids[length:]
        self.specs = [change for change in self.specs if change[0] < length]
        self.snapshots = {place: kept for place, kept in self.snapshots.items() if place <= length}

    def copied(self, length: int) -> Past:
        """The past of a lane that takes over the first `length` tokens."""
        other = Past(list(self.ids), list(self.specs), dict(self.snapshots))
        other.cut(length)
        return other
