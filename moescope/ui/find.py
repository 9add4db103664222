"""Addresses and text search: `L17`, `E062`, `L17E062`, `@412`, or a piece of the transcript.

The notation is the one the status line and exports use. All pure.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

from moescope.ui.history import Lane
from moescope.ui.routers import RouterTable

ADDRESS = re.compile(r"(?:L(?P<layer>\d+)(?P<site>a?))?(?:E(?P<expert>\d+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to go; None leaves that part of the cursor alone."""

    router: int | None = None
    expert: int | None = None
    position: int | None = None


def parse(text: str, table: RouterTable) -> Place | str | None:
    """A place, a sentence that says why it does not exist, or None: search the text for it."""
    wanted = text.strip()
    if re.fullmatch(r"@\d+", wanted):
        return Place(position=int(wanted[1:]))
    match = ADDRESS.fullmatch(wanted)
    if match is None or not wanted:
        return None
    router = None
    if match["layer"] is not None:
        router = next(
            (
                index
                for index, layer in enumerate(table.layers)
                if layer == int(match["layer"])
                and table.labels[index].endswith("a") == bool(match["site"])
            ),
            None,
        )
        if router is None:
            first, last = table.labels[0], table.labels[-1]
            return f"L{match['layer']} has no router (L{first} to L{last} do)"
    expert = int(match["expert"]) if match["expert"] is not None else None
    if expert is not None:
        most = int(table.num_experts[router]) if router is not None else table.widest
        if expert >= most:
            return f"E{expert} does not exist (E000 to E{most - 1:03d} do)"
    return Place(router, expert)


def hits(lane: Lane, text: str) -> list[int]:
    """Rows at which `text` begins in what the lane says, ignoring case."""
    starts, whole = [], ""
    for piece in lane.texts:
        starts.append(len(whole))
        whole += piece
    found: list[int] = []
    at, wanted = -1, text.casefold()
    folded = whole.casefold() if len(whole.casefold()) == len(whole) else whole.lower()
    while wanted and (at := folded.find(wanted, at + 1)) >= 0:
        row = _row_at(starts, at)
        if not found or found[-1] != row:
            found.append(row)
    return found


def _row_at(starts: list[int], at: int) -> int:
    return bisect.bisect_right(starts, at) - 1
