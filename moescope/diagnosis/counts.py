"""Evidence that is only how often each expert ran: predicted counts, and how likely others are.

Given noise of scale s, a token whose choice of an expert was close adds p (1 - p) to the variance
of its count; every count is off by a little beside. N tokens, L routers, E expert classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.likelihood import LOGISTIC, SCALES, SMALLEST, Fit
from moescope.kernels import reference
from moescope.kernels.reference import F64

if TYPE_CHECKING:
    from moescope.diagnosis.case import Predicted

BASE = 0.25  # of the variance of every count
FAR = 4.0  # standard deviations after which a count costs no more than its logarithm


def of(found: Predicted, classes: int) -> NDArray[np.int64]:
    """[L, E]: how often each expert is chosen."""
    counted = np.zeros((found.expert_ids.shape[1], classes), np.int64)
    for router in range(len(counted)):
        ids = found.expert_ids[:, router]
        counted[router] = np.bincount(ids[ids >= 0], minlength=classes)[:classes]
    return counted


def fit(found: Predicted, counts: NDArray[Any], floor: Any = SMALLEST) -> Fit:
    """Nats of recorded counts [L, E]; `Fit.nats` has one row."""
    floors = np.broadcast_to(np.asarray(floor, np.float64), (len(found.routers),))
    columns, scales = [], []
    for index, least in enumerate(floors):
        gaps = _distances(found, index)
        tried = np.unique(np.maximum(SCALES, least))
        nats = [_nats(gaps, counts[index], scale) for scale in tried]
        best = int(np.argmax(nats))
        columns.append(nats[best])
        scales.append(tried[best])
    return Fit(np.array(columns)[None], np.array(scales))


def _distances(found: Predicted, index: int) -> F64:
    """[N, E]: how far each class stands above (chosen) or below the cut, in logits."""
    router = found.routers[index]
    spec = router.spec
    logits = found.logits[:, index, : spec.E]
    if spec.wiring.hash_table:
        ids = reference._hashed_ids(
            found.token_ids, router.tensors.get("hash_table"), len(logits), spec
        )
        far = np.full(logits.shape, -np.inf)
        np.put_along_axis(far, ids, np.inf, 1)
        return far
    with np.errstate(all="ignore"):
        needed = spec.policy.correction_bias != "none"
        bias = reference._rows(
            "correction_bias", router.tensors.get("correction_bias"), logits.shape, needed
        )
        chosen = reference.select(logits, spec, bias)
        values = (
            chosen.values
            if needed
            else np.where(np.isneginf(chosen.values), -np.inf, chosen.logits)
        )
        ranked = -np.sort(-values, axis=1)
        if spec.E == spec.K:
            return np.full(logits.shape, np.inf)
        cut = (ranked[:, spec.K - 1] + ranked[:, spec.K]) / 2
    return values - np.where(np.isfinite(cut), cut, ranked[:, spec.K - 1])[:, None]


def _nats(distances: F64, counts: NDArray[Any], scale: float) -> float:
    with np.errstate(over="ignore"):
        chance = 1.0 / (1.0 + np.exp(np.clip(-LOGISTIC * distances / scale, -700, 700)))
    mean = chance.sum(0)
    variance = (chance * (1.0 - chance)).sum(0) + BASE
    off = np.abs(counts[: len(mean)] - mean) / np.sqrt(variance)
    cost = np.where(off < FAR, off**2 / 2, FAR**2 / 2 + FAR * np.log(np.maximum(off, FAR) / FAR))
    extra = counts[len(mean) :].sum()
    return -float((cost + np.log(variance) / 2).sum()) - float(extra)


def overlap(predicted: NDArray[Any], counts: NDArray[Any]) -> F64:
    """[L]: the share of picks that both have in common."""
    E = max(predicted.shape[1], counts.shape[1])
    wide = [np.pad(part, ((0, 0), (0, E - part.shape[1]))) for part in (predicted, counts)]
    most = np.maximum(wide[0].sum(1), wide[1].sum(1))
    shared: F64 = np.minimum(*wide).sum(1) / np.maximum(most, 1)
    return shared
