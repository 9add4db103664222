"""How far a router's logits are from somebody's decision: pure functions over rows of numbers.

For one router under one spec and what another engine recorded of it: by how much logits would have
to be off for these experts to be chosen in this order, and (`weighed`) how far the recorded weights
are from those the spec gives these experts. Nothing here knows a threshold. Letters: T rows, E
expert classes, K recorded experts, G groups, C comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import weighed
from moescope.diagnosis.weighed import STEEP, Cells, Steps, Tensors
from moescope.kernels import reference
from moescope.kernels.reference import F64, Selection
from moescope.kernels.spec import RouterPolicy, RouterSpec

Level = Literal["weights", "order", "sets", "counts"]
ROUNDING = 1e-5  # relative: recorded weights are taken for no better than this
TIE = 1e-5  # logits: what an exact tie, broken as the spec breaks it, counts as


EXACT = Steps()


@dataclass(frozen=True, slots=True, eq=False)
class Differences:
    """`gaps` [T, C], in logits: comparisons the choice rests on. Positive: it holds by so much;
    negative: it does not, unless logits were off by so much; −inf: no such error explains it; NaN:
    no comparison. `relative` [T, K]: |recorded − given weight| / recorded, NaN where there is none.
    `slopes` [T, K]: relative change of a weight per unit of its logit. `steps`: what the spec's
    dtypes leave of a weight, and `cells`, where weights are cast to a coarse one."""

    gaps: F64
    relative: F64
    slopes: F64
    steps: Steps = EXACT
    cells: Cells | None = None

    def error(self) -> F64:
        """The error of logits that would explain each row [T]; inf where none does."""
        with np.errstate(invalid="ignore"):
            shift = np.where(self.gaps < 0, -self.gaps, 0.0) / 2
            least = max(self.steps.largest, ROUNDING)
            beyond = np.maximum(self.relative - least, 0.0) / np.maximum(self.slopes, TIE)
            weight = np.where(np.isnan(self.relative), 0.0, beyond)
        most: F64 = np.maximum(shift.max(1, initial=0.0), weight.max(1, initial=0.0))
        return most


def differences(
    logits: NDArray[Any],
    spec: RouterSpec,
    tensors: Tensors,
    ids: NDArray[Any],
    weights: NDArray[Any] | None = None,
    *,
    ordered: bool = True,
    token_ids: NDArray[Any] | None = None,
) -> Differences:
    """What `spec` makes of `logits` [T, E] against recorded `ids` [T, K] (-1: none) and `weights`.

    A row without any id is compared in nothing: all NaN.
    """
    with np.errstate(all="ignore"):
        chosen = reference.select(logits, spec, weighed.bias_of(spec, tensors, logits.shape))
        if spec.wiring.hash_table:
            gaps = _table_gaps(spec, tensors, ids, token_ids, ordered)
        else:
            gaps = _gaps(chosen, spec, ids, ordered)
        gaps[~chosen.valid] = -np.inf
        recorded = (ids >= 0).any(1)
        gaps[~recorded] = np.nan
        if weights is None:
            nothing = np.full(ids.shape, np.nan)
            return Differences(gaps, nothing, np.ones(ids.shape))
        given = weighed.weights_at(logits, ids, spec, tensors)
        off = weighed.relative(weights, given, ids)
        slopes = weighed.slopes_of(chosen, spec, tensors, ids, weights)
        cells = weighed.cells_of(logits, spec, tensors, ids, weights, ROUNDING)
        return Differences(gaps, off, slopes, weighed.steps_of(chosen, spec), cells)


# --- the choice -----------------------------------------------------------------------------------


def _gaps(chosen: Selection, spec: RouterSpec, ids: NDArray[Any], ordered: bool) -> F64:
    """Comparisons [T, K + 2]: neighbours in the recorded order (or chosen and left out, pair by
    pair), the last chosen and the best left out, the number of experts."""
    p, (T, K) = spec.policy, ids.shape
    values, slope = _in_logits(chosen, p)
    higher = p.tie_break == "higher_id"
    rank = np.empty(values.shape, np.intp)
    order = reference._descending(chosen.values, higher)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(spec.E), rank.shape), 1)
    used = (ids >= 0) & (ids < spec.E)
    picked = np.zeros(values.shape, bool)
    safe = np.where(used, ids, 0).astype(np.intp)
    np.logical_or.at(picked, (np.arange(T)[:, None], safe), used)

    def gap(first: NDArray[np.intp], second: NDArray[np.intp]) -> F64:
        """By how much `first` stands above `second`, each [T]."""
        at = np.arange(T)
        distance = np.abs(values[at, first] - values[at, second])
        unit = np.maximum((slope[at, first] + slope[at, second]) / 2, STEEP)
        size = np.maximum(distance / unit, TIE)
        size = np.where(np.isnan(size), TIE, size)  # both excluded
        return np.where(rank[at, first] < rank[at, second], size, -size)

    columns = []
    if ordered:
        for k in range(K - 1):
            both = used[:, k] & used[:, k + 1]
            columns.append(np.where(both, gap(safe[:, k], safe[:, k + 1]), np.nan))
    left = ~picked & ~np.isneginf(chosen.values)
    columns += _across(rank, picked, left, gap, 1 if ordered else K)
    stacked = np.stack(columns, 1)
    outside = _outside(chosen, p, picked, rank)
    if outside is not None:  # then what follows from that is not compared
        error = np.where(stacked < 0, -stacked, 0.0).max(1)
        other = -outside < error
        stacked = np.where(other[:, None], np.nan, stacked)
        outside = np.where(other, outside, np.nan)
        stacked = np.concatenate([stacked, outside[:, None]], 1)
    count = np.where(used.sum(1) == spec.K, np.nan, -np.inf)
    return np.concatenate([stacked, count[:, None]], 1)


def _across(
    rank: NDArray[np.intp],
    picked: NDArray[np.bool_],
    left: NDArray[np.bool_],
    gap: Any,
    pairs: int,
) -> list[F64]:
    """The lowest chosen against the highest left out, then the next pair, where that one is the
    wrong way round; `pairs` at most."""
    E = rank.shape[1]
    lowest = np.argsort(np.where(picked, -rank, E), axis=1, kind="stable")
    highest = np.argsort(np.where(left, rank, E), axis=1, kind="stable")
    enough = np.minimum(picked.sum(1), left.sum(1))
    columns: list[F64] = []
    for k in range(min(pairs, E)):
        found = np.where(k < enough, gap(lowest[:, k], highest[:, k]), np.nan)
        columns.append(found if k == 0 else np.where(found < 0, found, np.nan))
    return columns


def _in_logits(chosen: Selection, p: RouterPolicy) -> tuple[F64, F64]:
    """Selection values and their slopes per logit [T, E]; logits, where scores rise with them."""
    by_logit = p.score_order == "topk_then_score" or p.scoring_func == "sparsemixer"
    zeroed = p.group_mask_fill == "0" and chosen.group_scores is not None
    if p.correction_bias == "logit" and by_logit:
        return chosen.biased, np.ones(chosen.biased.shape)
    if p.correction_bias == "none" and not zeroed:
        return chosen.logits, np.ones(chosen.logits.shape)
    slope = weighed.score_slopes(chosen, p)
    if zeroed:
        slope = np.where(chosen.values == chosen.biased, slope, 0.0)
    return chosen.values, slope


def _outside(
    chosen: Selection, p: RouterPolicy, picked: NDArray[np.bool_], rank: NDArray[np.intp]
) -> F64 | None:
    """By how much other groups than those admitted would explain a row, negative [T]: a group with
    a chosen expert missed by so much, or one that should have had some, and has none, made it by so
    much. −inf where that explains nothing. None where everything is admissible."""
    if chosen.group_scores is None:
        excluded = np.isneginf(chosen.values)
        if not excluded.any():
            return None
        return np.where((excluded & picked).any(1), -np.inf, np.nan)
    T, G = chosen.group_scores.shape
    order = reference._descending(chosen.group_scores, p.tie_break == "higher_id")
    admitted = np.zeros((T, G), bool)
    np.put_along_axis(admitted, order[:, : p.topk_group], True, 1)
    grouped = picked.reshape(T, G, -1)
    lowest = np.where(picked, rank, -1).max(1)[:, None, None]
    passed = ~grouped & (rank.reshape(grouped.shape) < lowest)  # should have been chosen
    lost = grouped.any(2) & ~admitted
    rejected = admitted & passed.any(2) & ~grouped.any(2)
    ranked = -np.sort(-chosen.group_scores, axis=1)
    cut, first_out = ranked[:, p.topk_group - 1, None], ranked[:, p.topk_group, None]
    missing = np.where(lost, cut - chosen.group_scores, 0.0)
    missing += np.where(rejected, chosen.group_scores - first_out, 0.0)
    by_logit = p.score_order == "topk_then_score"
    slopes = np.ones(picked.shape) if by_logit else weighed.score_slopes(chosen, p)
    error = missing / np.maximum(slopes.reshape(grouped.shape).max(2), STEEP)
    other = lost | rejected
    return np.where(other.any(1), -np.where(other, np.maximum(error, TIE), 0.0).max(1), -np.inf)


def _table_gaps(
    spec: RouterSpec,
    tensors: Tensors,
    ids: NDArray[Any],
    token_ids: NDArray[Any] | None,
    ordered: bool,
) -> F64:
    """Ids come from a table: they are these, or no error of logits explains others."""
    wanted = reference._hashed_ids(token_ids, tensors.get("hash_table"), len(ids), spec)
    if ids.shape[1] != wanted.shape[1]:
        return np.full((len(ids), 1), -np.inf)
    pair = (ids, wanted) if ordered else (np.sort(ids, 1), np.sort(wanted, 1))
    return np.where((pair[0] == pair[1]).all(1), np.inf, -np.inf)[:, None]
