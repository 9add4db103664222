"""Numbers that sum up routing: pure functions over columns of a trace.

Columns are what `TraceReader.column` gives. Letters: T tokens, L routers, K picked, E expert
classes. Unused slots (-1) count for nothing; NaN (invalid rows) stays NaN or is left out, as said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Allowed = float | tuple[float, float] | None  # `RouterSpec.allowed_score_sum`

# Rounding to nearest is off by at most this share of a number. A sum of positive weights is off by
# no larger share than each of them; normalising and scaling round again.
UNIT = {"float32": 2.0**-25, "float16": 2.0**-12, "bfloat16": 2.0**-9}
ROUNDINGS = 4
SMALLEST_SLACK = 1e-5  # sums are taken in another order, and eps is added to denominators


def expert_load(expert_ids: Ids, num_experts: int) -> NDArray[np.int64]:
    """Picks: load[l, e] = how often router l picked expert e. [T, L, K] -> [L, E]."""
    routers = expert_ids.shape[1]
    ids = expert_ids.astype(np.int64)
    cells = np.arange(routers)[None, :, None] * num_experts + ids
    used = cells[(ids >= 0) & (ids < num_experts)]
    return np.bincount(used, minlength=routers * num_experts).reshape(routers, num_experts)


def relative_load(load: NDArray[np.integer[Any]]) -> Floats:
    """load[l, e] / (sum over e of load[l, e] / E): 1 is a fair share. NaN for a router without
    picks. [L, E] -> [L, E]."""
    mean = load.sum(axis=1, keepdims=True) / load.shape[1]
    return load / np.where(mean > 0, mean, np.nan)


def load_variation(load: NDArray[np.integer[Any]]) -> Floats:
    """Coefficient of variation: standard deviation over experts / mean; 0 is perfectly balanced.
    [L, E] -> [L]."""
    return np.asarray(np.std(relative_load(load), axis=1))


def dead_experts(load: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Experts that were never picked by a router that picked something. [L, E] -> [L, E]."""
    return np.asarray((load == 0) & (load.sum(axis=1, keepdims=True) > 0))


def near_ties(margin: Floats, eps: float) -> NDArray[np.int64]:
    """Per token, the routers with margin < eps: decisions that rounding could turn. [T, L] -> [T].
    NaN (no runner-up) is no near tie."""
    return np.asarray((margin < eps).sum(axis=1), dtype=np.int64)


def shared_picks(expert_ids: Ids) -> NDArray[np.int64]:
    """shared[t, l] = |picks of token t ∩ picks of token t-1| in router l. [T, L, K] -> [T-1, L]."""
    return overlap(expert_ids[1:], expert_ids[:-1])


def recorded_weights(weights: Floats, expert_ids: Ids) -> Floats | None:
    """A column of weights as far as it was recorded: NaN in rows that are all 0 although experts
    were chosen, which is what a column holds where a frame has none; None where none has any.
    [T, L, K] -> [T, L, K]."""
    if weights.shape != expert_ids.shape:
        return None
    missing = (weights == 0).all(axis=2) & (expert_ids >= 0).any(axis=2)
    if missing[(expert_ids >= 0).any(axis=2)].all():
        return None
    return np.asarray(np.where(missing[..., None], np.nan, weights))


def overlap(a: Ids, b: Ids) -> NDArray[np.int64]:
    """Experts that both picked, row by row. [..., K], [..., K'] -> [...]."""
    same = (a[..., :, None] == b[..., None, :]) & (a >= 0)[..., :, None]
    return np.asarray(same.any(axis=-1).sum(axis=-1), dtype=np.int64)


def agreement(a: Ids, b: Ids) -> Floats:
    """Share of rows in which both picked the same set of experts, per router. [T, L, K] twice ->
    [L]; NaN without tokens."""
    if not len(a):
        return np.full(a.shape[1], np.nan)
    common = overlap(a, b)
    same = (common == (a >= 0).sum(axis=-1)) & (common == (b >= 0).sum(axis=-1))
    return np.asarray(same.mean(axis=0))


def first_uses(expert_ids: Ids, num_experts: int) -> NDArray[np.int64]:
    """Per token, the experts a router picked that it never picked before. [T, L, K] -> [T, L]."""
    tokens, routers, _ = expert_ids.shape
    seen = np.zeros((routers, num_experts), dtype=bool)
    fresh = np.zeros((tokens, routers), dtype=np.int64)
    for t in range(tokens):
        router, slot = np.nonzero(expert_ids[t] >= 0)
        picked = np.zeros_like(seen)
        picked[router, expert_ids[t, router, slot]] = True
        fresh[t] = (picked & ~seen).sum(axis=1)
        seen |= picked
    return fresh


def score_sum_percentiles(
    score_sum: Floats, percents: Sequence[float] = (5, 25, 50, 75, 95)
) -> Floats:
    """Percentiles of Σ over tokens, per router, invalid rows left out; NaN where none is valid.
    [T, L] -> [L, P]."""
    found = np.full((score_sum.shape[1], len(percents)), np.nan)
    for router, column in enumerate(score_sum.T):
        valid = column[np.isfinite(column)]
        if valid.size:
            found[router] = np.percentile(valid, percents)
    return found


def sum_violations(
    score_sum: Floats, allowed: Sequence[Allowed], *, dtype: str = "float32"
) -> NDArray[np.bool_]:
    """Where a score sum is not one that the trained spec allows. [T, L] -> [T, L].

    `allowed` per router: the number Σ must be, (low, high) with low excluded, or None where nothing
    can be said. `dtype` is what the combine weights were rounded to: Σ may be off by
    ROUNDINGS × UNIT[dtype] × max(|allowed|, 1). NaN is no violation: the row is invalid, which is
    shown otherwise.
    """
    wrong = np.zeros(score_sum.shape, dtype=bool)
    share = max(ROUNDINGS * UNIT[dtype], SMALLEST_SLACK)
    for router, rule in enumerate(allowed):
        if rule is None:
            continue
        sums = score_sum[:, router].astype(np.float64)
        low, high = rule if isinstance(rule, tuple) else (rule, rule)
        slack = share * max(abs(high), 1.0) if np.isfinite(high) else share
        below = sums <= low if isinstance(rule, tuple) else sums < low - slack
        wrong[:, router] = below | (sums > high + slack)
    return wrong
