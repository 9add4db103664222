"""How likely a recorded decision is, given what a router would have decided and noise: in nats.

An engine rounds; its logits differ from ours by an error whose scale s is not known. Given s, a
comparison of two experts that stand d logits apart comes out as it should with probability
logistic(LOGISTIC * d / s), and a recorded weight is off by a Student t of scale s. Where dtypes are
coarse, a weight is either the very same step or, the more likely the larger s, another one. Each
router's s is fitted, at least `floor`, so that a near tie costs little where the trace is noisy and
much where it is exact. Rows that nothing explains cost a bounded amount.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.decisions import Differences, Steps
from moescope.kernels.reference import F64

SMALLEST = 3e-6  # logits: float32 arithmetic in another order
SCALES = np.logspace(-6, 1, 22)
LOGISTIC = 1.2  # a normal error of scale s on both sides
OUTLIERS = 1e-5  # of comparisons: what cannot be explained costs log of half of it
ROUNDING = 1e-5  # relative: recorded weights are taken for no better than this
FREEDOM = 2.0  # of the Student t
COUNTED = 2.0  # weights of a row that count as independent, at most


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """`nats` [T, L] of every row at its router's best `scale` [L]; 0 where nothing was recorded."""

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
        nats = [rows(found, scale) for scale in tried]
        best = int(np.argmax([column.sum() for column in nats]))
        columns.append(nats[best])
        scales.append(tried[best])
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
    through = steps.weight**2 + steps.score**2 + (steps.logit * found.slopes) ** 2
    nats = _student(off, np.sqrt(noise**2 + through / 6.0 + ROUNDING**2))  # each to its own step
    if steps.largest:
        same = _same(scale, noise, steps)
        exact = _student(off, np.full(off.shape, ROUNDING)) + np.log(same)
        nats = np.logaddexp(exact, nats + np.log1p(-same))
    count = recorded.sum(1)
    share = np.minimum(count, COUNTED) / np.maximum(count, 1)
    total: F64 = np.where(recorded, nats, 0.0).sum(1) * share
    return total


def _same(scale: float, noise: F64, steps: Steps) -> F64:
    """The chance that a weight is on the very same step: what it is made of did not move, or not by
    as much as its own last step."""
    unmoved = np.zeros(noise.shape)
    if steps.score or steps.logit:
        of_logit = steps.logit / (scale + steps.logit) if steps.logit else 1.0
        of_score = steps.score / (noise + steps.score) if steps.score else 1.0
        unmoved = np.broadcast_to((of_logit * of_score) ** steps.count, noise.shape)
    held = steps.weight / (noise + steps.score + steps.logit + steps.weight)
    chance: F64 = unmoved + (1.0 - unmoved) * held
    return chance


def _student(off: F64, width: F64) -> F64:
    """Log density, but for a constant."""
    nats: F64 = -np.log(width) - (FREEDOM + 1.0) / 2.0 * np.log1p((off / width) ** 2 / FREEDOM)
    return nats
