"""How likely a recorded decision is, given what a router would have decided and noise: in nats.

An engine rounds; its logits differ from ours by an error whose scale s is not known. Given s, a
comparison of two experts that stand d logits apart comes out as it should with probability
logistic(LOGISTIC * d / s), and a recorded weight is off by a Student t of scale s. Where weights
are cast to a coarse dtype, it is the chance of the recorded number's whole cell; where what they
are made of is rounded, that is either as predicted or, the more likely the larger s, a step away.
Each router's s is fitted, at least `floor`, so that a near tie costs little where the trace is
noisy and much where it is exact. Rows that nothing explains cost a bounded amount.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.decisions import ROUNDING, Differences
from moescope.diagnosis.weighed import Steps
from moescope.kernels.reference import F64

SMALLEST = 3e-6  # logits: float32 arithmetic in another order
SCALES = np.logspace(-6, 1, 22)
LOGISTIC = 1.2  # a normal error of scale s on both sides
LEVEL = 1.0  # nats that say nothing
OUTLIERS = 1e-5  # of comparisons: what cannot be explained costs log of half of it
PEAK = 2.0**1.5  # a Student t of two degrees of freedom is 1 / PEAK high, for a width of 1
FINER = 10.0 ** (np.array([-2, -1, 1, 2]) / 9)  # around the best of SCALES
COUNTED = 2.0  # weights of a row that count as independent, at most


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """`nats` [T, L] of every row at its router's best scale, 0 where nothing was recorded; `scale`
    [L], the smallest that does as well, within `LEVEL`."""

    nats: F64
    scale: F64

    @property
    def total(self) -> float:
        return float(self.nats.sum())

    def of(self, router: int) -> float:
        return float(self.nats[:, router].sum())


def fit(routers: Sequence[Differences], floor: NDArray[np.float64] | float = SMALLEST) -> Fit:
    """Fit every router's scale; `floor` is the smallest allowed, for all or for each."""
    floors = np.broadcast_to(np.asarray(floor, np.float64), (len(routers),))
    columns, scales = [], []
    for found, least in zip(routers, floors, strict=True):
        tried = np.unique(np.maximum(SCALES, least))
        nats = {scale: rows(found, scale) for scale in tried}
        best = max(nats, key=lambda scale: float(nats[scale].sum()))
        nats |= {scale: rows(found, scale) for scale in np.maximum(best * FINER, least)}
        totals = {scale: float(column.sum()) for scale, column in nats.items()}
        best = max(totals, key=lambda scale: totals[scale])
        columns.append(nats[best])
        scales.append(min(s for s, total in totals.items() if total >= totals[best] - LEVEL))
    return Fit(np.stack(columns, 1), np.array(scales))


def rows(found: Differences, scale: float) -> F64:
    """Nats of every row [T] given the scale of the noise."""
    return _choice(found.gaps, scale) + _weights(found, scale)


def _choice(gaps: F64, scale: float) -> F64:
    with np.errstate(over="ignore", invalid="ignore"):
        holds = 1.0 / (1.0 + np.exp(np.clip(-LOGISTIC * gaps / scale, -700, 700)))
        nats = np.log((1.0 - OUTLIERS) * holds + OUTLIERS / 2)
    total: F64 = np.where(np.isnan(gaps), 0.0, nats).sum(1)
    return total


def _weights(found: Differences, scale: float) -> F64:
    recorded = ~np.isnan(found.relative)
    if not recorded.any():
        return np.zeros(len(found.relative))
    off = np.minimum(np.where(recorded, found.relative, 0.0), 1e6)
    noise, steps = scale * found.slopes, found.steps
    through = steps.score**2 + (steps.logit * found.slopes) ** 2
    nats = _at(found, off, np.sqrt(noise**2 + through / 6.0 + ROUNDING**2))  # each to its own step
    if steps.score or steps.logit:
        same = _unmoved(scale, noise, steps)
        exact = _at(found, off, np.full(off.shape, ROUNDING)) + np.log(same)
        nats = np.logaddexp(exact, nats + np.log1p(-same))
    count = recorded.sum(1)
    share = np.minimum(count, COUNTED) / np.maximum(count, 1)
    total: F64 = np.where(recorded, nats, 0.0).sum(1) * share
    return total


def _unmoved(scale: float, noise: F64, steps: Steps) -> F64:
    """The chance that all that a weight is made of was rounded to the very same steps."""
    chance = np.ones(noise.shape)
    if steps.logit:
        chance *= _stays(steps.logit / scale)
    if steps.score:
        chance *= _stays(steps.score / np.maximum(noise, ROUNDING / 10))
    return np.clip(chance**steps.count, 1e-12, 1.0 - 1e-12)


def _stays(steps: Any) -> Any:
    """The chance that an error leaves a number on its step of `steps` times its scale: the mean of
    1 - |error| / step where that is positive, within 0.03."""
    return steps / (steps + 0.8 + 1.7 / (1.0 + steps))


def _at(found: Differences, off: F64, width: F64) -> F64:
    """Log density of each recorded weight, relative; where it is cast, of its cell, as if that were
    so narrow that what is predicted exactly is as likely as without a cast."""
    if found.cells is None:
        return _student(off, width)
    apart = _student(off, np.sqrt(width**2 + found.steps.weight**2 / 6.0))
    mass = _mass(found.cells.low / width, found.cells.high / width)
    return np.where(np.isnan(mass), apart, np.log(np.maximum(mass, 1e-300) / (PEAK * ROUNDING)))


def _mass(low: F64, high: F64) -> F64:
    """Of a Student t with two degrees of freedom between two points."""
    above, below = _tail(low) - _tail(high), _tail(-high) - _tail(-low)
    inside = 1.0 - _tail(high) - _tail(-low)
    mass: F64 = np.where(low > 0, above, np.where(high < 0, below, inside))
    return mass


def _tail(x: F64) -> F64:
    """The chance to be above x, exact for large x too; of negative ones that of 0."""
    x = np.maximum(x, 0.0)
    root = np.sqrt(2.0 + x**2)
    tail: F64 = 1.0 / (root * (root + x))
    return tail


def _student(off: F64, width: F64) -> F64:
    """Log density, with two degrees of freedom."""
    nats: F64 = -np.log(width * PEAK) - 1.5 * np.log1p((off / width) ** 2 / 2.0)
    return nats
