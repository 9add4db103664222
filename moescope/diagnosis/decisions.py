"""How far a router's logits are from somebody's decision: pure functions over rows of numbers.

For one router under one spec and what another engine recorded of it: by how much logits would have
to be off for these experts to be chosen in this order, and how far the recorded weights are from
those the spec gives these experts. Nothing here knows a threshold. Letters: T rows, E expert
classes, K recorded experts, C comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.kernels import reference
from moescope.kernels.reference import F64, Selection
from moescope.kernels.spec import RouterPolicy, RouterSpec

Level = Literal["weights", "order", "sets", "counts"]
Tensors = Mapping[str, NDArray[Any]]
TIE = 1e-5  # logits: what an exact tie, broken as the spec breaks it, counts as
STEEP = 1e-6  # the flattest slope of a score that is told from a constant
TRIED = 1e-3  # logits
FLATTEST, STEEPEST = 0.1, 1e4  # slopes of weights that are believed
STEPS = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALL = 0.02  # of a row's mean weight: weights below it are compared to this


@dataclass(frozen=True, slots=True)
class Steps:
    """What coarse dtypes leave: the size of a step of the weight itself and of the scores it is
    made of, relative, and of their logits; 0 for float32. A weight is made of `count` numbers."""

    weight: float = 0.0
    score: float = 0.0
    logit: float = 0.0
    count: int = 1

    @property
    def largest(self) -> float:
        return max(self.weight, self.score, self.logit)


@dataclass(frozen=True, slots=True, eq=False)
class Differences:
    """`gaps` [T, C], in logits: comparisons the choice rests on. Positive: it holds by so much;
    negative: it does not, unless logits were off by so much; −inf: no such error explains it; NaN:
    no comparison. `relative` [T, K]: |recorded − given weight| / recorded, NaN where there is none.
    `slopes` [T, K]: relative change of a weight per unit of its logit. `steps`: what the spec's
    dtypes leave of a weight."""

    gaps: F64
    relative: F64
    slopes: F64
    steps: Steps = Steps()

    def error(self) -> F64:
        """The error of logits that would explain each row [T]; inf where none does."""
        with np.errstate(invalid="ignore"):
            shift = np.where(self.gaps < 0, -self.gaps, 0.0) / 2
            beyond = np.maximum(self.relative - self.steps.largest, 0.0) / self.slopes
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
        chosen = reference.select(logits, spec, _bias(spec, tensors, logits.shape))
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
        given = weights_at(logits, ids, spec, tensors)
        slopes = _slopes(chosen, spec, tensors, logits, ids, weights)
        return Differences(gaps, _relative(weights, given, ids), slopes, _steps(chosen, spec))


def weights_at(logits: NDArray[Any], ids: NDArray[Any], spec: RouterSpec, tensors: Tensors) -> F64:
    """The combine weights [T, K] that `spec` gives experts `ids` [T, K], chosen or not; -1: 0."""
    used = (ids >= 0) & (ids < spec.E)
    first = np.argsort(~used, axis=1, kind="stable")  # used places first
    counts = used.sum(1)
    out = np.zeros(ids.shape)
    with np.errstate(all="ignore"):
        bias = _bias(spec, tensors, logits.shape)
        scale = _scale(spec, tensors, logits.shape)
        chosen = reference.select(logits, spec, bias)
        for count in np.unique(counts[counts > 0]):
            if spec.policy.scoring_func == "sparsemixer" and count != 2:
                continue
            rows = np.flatnonzero(counts == count)
            places = first[rows, :count]
            part = _rows_of(chosen, rows)
            some = np.take_along_axis(ids[rows], places, 1).astype(np.intp)
            scores = reference._selected_scores(part, some, spec.policy)
            weights = reference._combine_weights(
                part, some, scores, _of(bias, rows), _of(scale, rows), spec
            )
            out[rows[:, None], places] = weights
    return out


def _bias(spec: RouterSpec, tensors: Tensors, shape: tuple[int, ...]) -> F64 | None:
    needed = spec.policy.correction_bias != "none"
    return reference._rows("correction_bias", tensors.get("correction_bias"), shape, needed)


def _scale(spec: RouterSpec, tensors: Tensors, shape: tuple[int, ...]) -> F64 | None:
    held, needed = tensors.get("per_expert_scale"), spec.policy.per_expert_scale
    return reference._rows("per_expert_scale", held, shape, needed)


def _of(rows: F64 | None, at: NDArray[np.intp]) -> F64 | None:
    return rows if rows is None or len(rows) == 1 else rows[at]


def _rows_of(chosen: Selection, at: NDArray[np.intp]) -> Selection:
    groups = chosen.group_scores
    return Selection(
        logits=chosen.logits[at],
        scores=chosen.scores[at],
        biased=chosen.biased[at],
        values=chosen.values[at],
        group_scores=None if groups is None else groups[at],
        entropy=chosen.entropy[at],
        valid=chosen.valid[at],
    )


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
    outside = _outside(chosen, p, safe, used)
    stacked = np.stack(columns, 1)
    if outside is not None:  # its group was not admitted: what follows from that is not compared
        stacked = np.where(np.isnan(outside)[:, None], stacked, np.nan)
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
    slope = _score_slope(chosen, p)
    if zeroed:
        slope = np.where(chosen.values == chosen.biased, slope, 0.0)
    return chosen.values, slope


def _score_slope(chosen: Selection, p: RouterPolicy) -> F64:
    """d score / d logit, of a class's own logit [T, E]."""
    z, s = chosen.logits, chosen.scores
    if p.scoring_func == "sqrtsoftplus":
        return 1.0 / (1.0 + np.exp(-z)) / (2.0 * np.maximum(s, STEEP))
    return s * (1.0 - s)


def _outside(
    chosen: Selection, p: RouterPolicy, safe: NDArray[np.intp], used: NDArray[np.bool_]
) -> F64 | None:
    """For rows with an expert that was not admissible: by how much its group missed, negative; NaN
    for the others. None where everything is admissible."""
    excluded = np.isneginf(chosen.values)
    if chosen.group_scores is None:
        if not excluded.any():
            return None
        lost = (np.take_along_axis(excluded, safe, 1) & used).any(1)
        return np.where(lost, -np.inf, np.nan)
    T, G = chosen.group_scores.shape
    size = chosen.values.shape[1] // G
    ranked = -np.sort(-chosen.group_scores, axis=1)
    cut = ranked[:, p.topk_group - 1 : p.topk_group]
    missing = np.take_along_axis(cut - chosen.group_scores, safe // size, 1)
    slopes = _in_logits(chosen, p)[1].reshape(T, G, size).max(2)
    missing = missing / np.maximum(np.take_along_axis(slopes, safe // size, 1), STEEP)
    order = reference._descending(chosen.group_scores, p.tie_break == "higher_id")
    admitted = np.zeros((T, G), bool)
    np.put_along_axis(admitted, order[:, : p.topk_group], True, 1)
    lost = used & ~np.take_along_axis(admitted, safe // size, 1)
    if p.group_mask_fill == "0":  # others may be chosen all the same
        lost &= False
    worst = np.where(lost, np.maximum(missing, TIE), 0.0).max(1)
    return np.where(lost.any(1), -worst, np.nan)


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


# --- the weights ----------------------------------------------------------------------------------


def _relative(recorded: NDArray[Any], given: F64, ids: NDArray[Any]) -> F64:
    used = (ids >= 0) & np.isfinite(recorded)
    off = np.abs(recorded - given) / _size(recorded, used)
    return np.where(used, np.where(np.isfinite(off), off, np.inf), np.nan)


def _steps(chosen: Selection, spec: RouterSpec) -> Steps:
    p, wiring = spec.policy, spec.wiring
    size = np.abs(chosen.logits[np.isfinite(chosen.logits)])
    usual = float(np.median(size)) if size.size else 0.0
    logit = max(STEPS[p.logits_dtype], STEPS[wiring.router_dtype]) * usual
    weight, score = STEPS[wiring.combine_dtype], STEPS[p.score_dtype]
    if p.norm_topk_prob:
        return Steps(weight, score, logit, spec.K)
    everything = p.scoring_func == "softmax" and p.score_order == "score_then_topk"
    return Steps(max(weight, score), 0.0, logit, spec.E if everything else spec.K)


def _size(recorded: NDArray[Any], used: NDArray[np.bool_]) -> F64:
    """What a recorded weight is compared to: itself, or some of its row's mean."""
    wide = np.where(used, np.abs(recorded.astype(np.float64)), 0.0)
    mean = wide.sum(1, keepdims=True) / np.maximum(used.sum(1, keepdims=True), 1)
    size: F64 = np.maximum(np.maximum(wide, SMALL * mean), 1e-30)
    return size


def _slopes(
    chosen: Selection,
    spec: RouterSpec,
    tensors: Tensors,
    logits: NDArray[Any],
    ids: NDArray[Any],
    recorded: NDArray[Any],
) -> F64:
    """Relative change of a weight per unit of error in the logits, of the size it has."""
    p = spec.policy
    if p.weights_from != "scores":
        return _measured_slopes(spec, tensors, logits, ids, recorded)
    if p.scoring_func in ("softmax", "sparsemixer"):
        return np.ones(ids.shape)
    safe = np.where((ids >= 0) & (ids < chosen.logits.shape[1]), ids, 0).astype(np.intp)
    score = np.take_along_axis(chosen.scores, safe, 1)
    slope = np.take_along_axis(_score_slope(chosen, p), safe, 1)
    return np.clip(slope / np.maximum(score, STEEP), FLATTEST, 1.0)


def _measured_slopes(
    spec: RouterSpec,
    tensors: Tensors,
    logits: NDArray[Any],
    ids: NDArray[Any],
    recorded: NDArray[Any],
) -> F64:
    """Sums of biased scores may be close to 0, and what is divided by them jumps: tried, with
    errors of `TRIED` logits and without any rounding."""
    exact = dict.fromkeys(("logits_dtype", "score_dtype", "correction_bias_dtype"), "float32")
    smooth = spec.with_policy(**exact).with_wiring(combine_dtype="float32")
    before = weights_at(logits, ids, smooth, tensors)
    signs = np.random.default_rng(0).choice([-TRIED, TRIED], (2, *logits.shape))
    moved = [weights_at(logits + sign, ids, smooth, tensors) - before for sign in signs]
    change = np.sqrt(np.mean(np.square(moved), axis=0)) / TRIED
    used = (ids >= 0) & np.isfinite(recorded)
    steep = change / _size(recorded, used)
    slopes: F64 = np.where(np.isfinite(steep), np.clip(steep, FLATTEST, STEEPEST), STEEPEST)
    return slopes
