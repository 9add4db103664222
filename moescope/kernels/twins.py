"""How far two routings of the same rows are apart: of a kernel, and of its slow twin.

`agreement.compare` says whether two kernels agree by the rule; here is what a person is shown.
Numpy, and whatever numpy takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.kernels.spec import Routing


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """As much of a `Routing` as two are compared by."""

    expert_ids: Any  # [..., K]
    weights: Any  # [..., K]


@dataclass(frozen=True, slots=True)
class Difference:
    """`weight` is the largest difference among weights of the same experts; 0 where there are none.
    NaN differs from a number by infinity."""

    weight: float = 0.0
    other_ids: int = 0  # rows whose sets of experts differ, or of which one is invalid
    rows: int = 0

    def __add__(self, other: Difference) -> Difference:
        """Of both rows together."""
        return Difference(
            max(self.weight, other.weight),
            self.other_ids + other.other_ids,
            self.rows + other.rows,
        )

    def line(self) -> str:
        """`largest weight difference 6e-08, other experts in 0 of 48 rows`."""
        return (
            f"largest weight difference {self.weight:.1g}, "
            f"other experts in {self.other_ids} of {self.rows} rows"
        )


def difference(one: Routing | Picks, other: Routing | Picks) -> Difference:
    """Between routings [..., K] of the same rows; in whatever order the picks stand."""
    ids, weights = [], []
    for routing in (one, other):
        found = np.asarray(routing.expert_ids)
        order = np.argsort(found, axis=-1, kind="stable")
        ids.append(np.take_along_axis(found, order, axis=-1))
        weights.append(np.take_along_axis(np.asarray(routing.weights), order, axis=-1))
    same = (ids[0] == ids[1]).all(-1)
    x, y = (np.where(same[..., None], w, 0.0).astype(np.float64) for w in weights)
    equal = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        apart = np.where(equal, 0.0, np.nan_to_num(np.abs(x - y), nan=np.inf))
    return Difference(float(apart.max(initial=0.0)), int((~same).sum()), same.size)
