"""Which rows of a gate to keep in higher precision: those whose error turns decisions.

A flip is blamed on a row of the gate where giving that row alone the logit of the original gate
undoes it. Rows are ranked by the flips they undo. Letters: E expert classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.causes import selected
from moescope.kernels.spec import RouterSpec


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
    flips: int  # that the gate alone explains
    shared: int
    row_bytes: int  # what one row takes at 16 bits


class GateBlame:
    """Collects flips and blames rows; the `blamed` of an `InputsJudge`."""

    def __init__(
        self, layers: Sequence[int], tensors: Sequence[Mapping[str, NDArray[Any]]], hidden: int
    ) -> None:
        self.layers, self.tensors, self.hidden = layers, tensors, hidden
        self.flips = self.shared = 0
        self._rows: dict[tuple[int, int], list[float]] = {}

    def __call__(
        self, router: int, chosen: Any, logits: Any, original: Any, spec: RouterSpec
    ) -> None:
        """`chosen` by the original gate; `logits` of the other gate and `original` ones [E], both
        on the original's input; `spec` of the other."""
        self.flips += 1
        wanted = {int(expert) for expert in chosen if expert >= 0}
        now = self._selected(logits, spec, router)
        undone = False
        for expert in sorted(wanted ^ now):
            if not (expert < len(original) and np.isfinite(original[expert])):
                continue
            mended = logits.copy()
            mended[expert] = original[expert]
            if self._selected(mended, spec, router) == wanted:
                error = abs(float(original[expert]) - float(logits[expert]))
                self._rows.setdefault((router, expert), []).append(error)
                undone = True
        self.shared += not undone

    def _selected(self, logits: NDArray[Any], spec: RouterSpec, router: int) -> set[int]:
        ids = selected(logits[None], spec, [self.tensors[router]])[0]
        return {int(expert) for expert in ids if expert >= 0}

    def result(self) -> GateRows:
        ranked = sorted(self._rows.items(), key=lambda item: (-len(item[1]), item[0]))
        return GateRows(
            rows=tuple(
                GateRow(self.layers[router], expert, len(errors), max(errors))
                for (router, expert), errors in ranked
            ),
            flips=self.flips,
            shared=self.shared,
            row_bytes=2 * self.hidden,
        )
