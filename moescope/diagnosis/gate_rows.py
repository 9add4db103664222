"""Which rows of a gate to keep in higher precision: those whose error turns decisions.

A flip is blamed on a row of the gate where giving that row alone the logit of the original gate
undoes it (`engine/crossed.py`). Rows are ranked by the flips they undo.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moescope.engine.crossed import Flip


@dataclass(frozen=True, slots=True)
class GateRow:
    """A row of the second model's gate. `flips`: decisions it turned by itself."""

    layer: int
    expert: int
    flips: int
    error: float  # largest |difference of its logit| at those flips


@dataclass(frozen=True, slots=True)
class GateRows:
    """Rows by the flips they turned, most first; `shared` flips need several rows at once."""

    rows: tuple[GateRow, ...]
    flips: int  # that rows of the gate explain
    shared: int
    row_bytes: int | None  # what one row takes at 16 bits, where the width is known


class GateBlame:
    """Collects flips and ranks rows. `hidden` is the width of a row, None: not known."""

    def __init__(self, layers: Sequence[int], hidden: int | None = None) -> None:
        self.layers, self.hidden = layers, hidden
        self.flips = self.shared = 0
        self._rows: dict[tuple[int, int], list[float]] = {}

    def take(self, flips: Iterable[Flip]) -> None:
        """Some flips; those that no gate explains are passed over."""
        for flip in flips:
            if flip.rows is None:
                continue
            self.flips += 1
            self.shared += not flip.rows
            for expert, error in flip.rows:
                self._rows.setdefault((flip.router, expert), []).append(error)

    def result(self) -> GateRows:
        ranked = sorted(self._rows.items(), key=lambda item: (-len(item[1]), item[0]))
        return GateRows(
            rows=tuple(
                GateRow(self.layers[router], expert, len(errors), max(errors))
                for (router, expert), errors in ranked
            ),
            flips=self.flips,
            shared=self.shared,
            row_bytes=None if self.hidden is None else 2 * self.hidden,
        )
