"""How far recorded weights are from those that a spec gives the same experts: pure functions.

The weights of any experts, chosen or not, what coarse dtypes leave of them, and how much of an
error in the logits reaches them. Nothing here knows a threshold. Letters: T rows, E expert classes,
K recorded experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels import reference
from moescope.kernels.reference import F64, Selection
from moescope.kernels.spec import RouterPolicy, RouterSpec

Tensors = Mapping[str, NDArray[Any]]
STEEP = 1e-6  # the flattest slope of a score that is told from a constant
# Slopes of weights that are believed, but for those that no logit moves: what is done to weights in
# an engine's dtype leaves errors too, about a tenth of what its logits have.
FLATTEST, STEEPEST = 0.1, 1e4
STEPS = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
LEAST_EXPONENT = -20  # of two; weights below are told from 0 no better
FEW = 0.1  # of the weights: in another format than the others
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


def weights_at(logits: NDArray[Any], ids: NDArray[Any], spec: RouterSpec, tensors: Tensors) -> F64:
    """The combine weights [T, K] that `spec` gives experts `ids` [T, K], chosen or not; -1: 0."""
    used = (ids >= 0) & (ids < spec.E)
    first = np.argsort(~used, axis=1, kind="stable")  # used places first
    counts = used.sum(1)
    out = np.zeros(ids.shape)
    with np.errstate(all="ignore"):
        bias = bias_of(spec, tensors, logits.shape)
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


def bias_of(spec: RouterSpec, tensors: Tensors, shape: tuple[int, ...]) -> F64 | None:
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


def relative(recorded: NDArray[Any], given: F64, ids: NDArray[Any]) -> F64:
    used = (ids >= 0) & np.isfinite(recorded)
    off = np.abs(recorded - given) / size_of(recorded, used)
    return np.where(used, np.where(np.isfinite(off), off, np.inf), np.nan)


def steps_of(chosen: Selection, spec: RouterSpec) -> Steps:
    p, wiring = spec.policy, spec.wiring
    size = np.abs(chosen.logits[np.isfinite(chosen.logits)])
    usual = float(np.median(size)) if size.size else 0.0
    logit = max(STEPS[p.logits_dtype], STEPS[wiring.router_dtype]) * usual
    weight, score = STEPS[wiring.combine_dtype], STEPS[p.score_dtype]
    everything = p.scoring_func == "softmax" and p.score_order == "score_then_topk"
    if _scores_are_weights(spec):
        weight, score = max(weight, score), 0.0
    return Steps(weight, score, logit, spec.K if p.norm_topk_prob or not everything else spec.E)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """What a coarse dtype makes the same recorded weight of: its ends `low` and `high` [T, K], as
    distances from the weight that was given before it was cast, relative to `size_of` it. NaN where
    the recorded weight is none of the dtype's numbers."""

    low: F64
    high: F64


def cells_of(
    logits: NDArray[Any],
    spec: RouterSpec,
    tensors: Tensors,
    ids: NDArray[Any],
    recorded: NDArray[Any],
    room: float,
) -> Cells | None:
    """The cells of `recorded`, numbers of the dtype that `spec` casts to, up to `room`, relative;
    None where it casts to none, or they are others: an engine casts all weights or none."""
    dtype, unit, smooth = last_cast(spec)
    if not STEPS[dtype]:
        return None
    used = (ids >= 0) & np.isfinite(recorded)
    value = np.where(used, recorded, np.nan).astype(np.float64) / unit
    given = weights_at(logits, ids, smooth, tensors) / unit
    size, magnitude = size_of(value, used), np.abs(value)
    mantissa, exponent = np.frexp(magnitude)
    step = np.ldexp(2 * STEPS[dtype], np.maximum(exponent, LEAST_EXPONENT) - 1)
    inner = magnitude - np.where(mantissa == 0.5, step / 4, step / 2)
    outer = magnitude + step / 2
    ends = np.where(value < 0, -outer, inner), np.where(value < 0, -inner, outer)
    off = np.abs(reference.round_to(value, dtype) - value) > room * magnitude
    if off.sum() > FEW * used.sum():
        return None
    low, high = (np.where(off, np.nan, (end - given) / size) for end in ends)
    return Cells(low, high)


def last_cast(spec: RouterSpec) -> tuple[str, float, RouterSpec]:
    """The last dtype to which weights are cast, what they are multiplied with after it, and the
    spec without it. Scores that are not divided by anything are cast by their own dtype."""
    smooth = spec.with_wiring(combine_dtype="float32")
    if not _scores_are_weights(spec):
        return spec.wiring.combine_dtype, 1.0, smooth
    smooth = smooth.with_policy(score_dtype="float32")
    if STEPS[spec.wiring.combine_dtype]:
        return spec.wiring.combine_dtype, 1.0, smooth
    return spec.policy.score_dtype, spec.weight_scale, smooth


def _scores_are_weights(spec: RouterSpec) -> bool:
    p = spec.policy
    plain = p.weights_from == "scores" and p.score_passes == 1 and not p.per_expert_scale
    return plain and not p.norm_topk_prob


def size_of(recorded: NDArray[Any], used: NDArray[np.bool_]) -> F64:
    """What a recorded weight is compared to: itself, or some of its row's mean."""
    wide = np.where(used, np.abs(recorded.astype(np.float64)), 0.0)
    mean = wide.sum(1, keepdims=True) / np.maximum(used.sum(1, keepdims=True), 1)
    size: F64 = np.maximum(np.maximum(wide, SMALL * mean), 1e-30)
    return size


# --- what an error of the logits does to a weight -------------------------------------------------


def slopes_of(
    chosen: Selection,
    spec: RouterSpec,
    tensors: Tensors,
    ids: NDArray[Any],
    recorded: NDArray[Any],
) -> F64:
    """How much a weight changes, relative to `size_of` it, for each unit of error in the logits,
    where every logit is off by as much and independently [T, K]."""
    if spec.policy.scoring_func == "sparsemixer":
        return np.ones(ids.shape)
    used = (ids >= 0) & (ids < spec.E)
    safe = np.where(used, ids, 0).astype(np.intp)
    share, slope, squares = _shares(chosen, spec.policy, safe, used)
    change = np.sqrt(np.maximum(slope**2 * (1.0 - 2.0 * share) + share**2 * squares, 0.0))
    scale = _scale(spec, tensors, chosen.logits.shape)
    if scale is not None:
        change = change * np.take_along_axis(reference._fit(scale, len(ids)), safe, axis=1)
    steep = np.abs(change * spec.weight_scale) / size_of(recorded, used & np.isfinite(recorded))
    found = np.where(np.isfinite(steep), np.clip(steep, FLATTEST, STEEPEST), STEEPEST)
    return np.where(steep == 0, 0.0, found)


def _shares(
    chosen: Selection, p: RouterPolicy, safe: NDArray[np.intp], used: NDArray[np.bool_]
) -> tuple[F64, F64, F64]:
    """Weights before any scale [T, K], their slopes per unit of their own logit before what they
    are divided by moves, and the sum of squares [T, 1] of the slopes of all that they are divided
    by (0: nothing)."""
    everything = (
        p.scoring_func == "softmax"
        and p.score_order == "score_then_topk"
        and not p.norm_topk_prob
        and p.weights_from in ("scores", "biased_minus_bias")
    )
    if everything:
        scores, squares = _softmax_slopes(chosen.logits, p)
        share, slope = (np.take_along_axis(x, safe, 1) for x in (chosen.scores, scores))
        return share, slope, squares
    values, slopes = (np.where(used, x, 0.0) for x in _undivided(chosen, p, safe))
    divided = p.norm_topk_prob or _scored_after(p)
    if not divided:
        return np.zeros(values.shape), slopes, np.zeros((len(values), 1))
    total = values.sum(1, keepdims=True)
    share, slope = values / total, slopes / total
    return share, slope, np.square(slope).sum(1, keepdims=True)


def _scored_after(p: RouterPolicy) -> bool:
    after = p.score_order == "topk_then_score" and p.scoring_func == "softmax"
    return after and p.weights_from != "logits"


def _softmax_slopes(z: F64, p: RouterPolicy) -> tuple[F64, F64]:
    """Of a softmax over all classes: the slopes of its numerators, over its sum [T, E], and the sum
    of their squares [T, 1]."""
    score = reference._score(z, "softmax")
    slope = score
    for _ in range(p.score_passes - 1):
        inner = score * (1.0 - score)
        score = reference._score(score, "softmax")
        slope = score * inner
    return slope, np.square(slope).sum(1, keepdims=True)


def _undivided(chosen: Selection, p: RouterPolicy, safe: NDArray[np.intp]) -> tuple[F64, F64]:
    """What weights are before they are divided by their sum, and its slopes [T, K]."""
    biased = p.weights_from == "biased_scores"
    z = np.take_along_axis(chosen.logits, safe, 1)
    if p.weights_from == "logits":
        return z, np.ones(z.shape)
    if biased and p.score_order == "topk_then_score":
        z = np.take_along_axis(chosen.biased, safe, 1)
    if p.scoring_func == "softmax" and (p.score_order == "topk_then_score" or not biased):
        slope = np.exp(z - z.max(1, keepdims=True))
        if p.score_passes == 1:
            return slope, slope
        score = np.take_along_axis(reference._score(chosen.logits, "softmax"), safe, 1)
        twice = np.exp(score)
        return twice, twice * score * (1.0 - score)
    score = np.take_along_axis(chosen.scores, safe, 1)
    slope = np.take_along_axis(score_slopes(chosen, p), safe, 1)
    return (np.take_along_axis(chosen.biased, safe, 1) if biased else score), slope


def score_slopes(chosen: Selection, p: RouterPolicy) -> F64:
    """d score / d logit, of a class's own logit [T, E]."""
    z, s = chosen.logits, chosen.scores
    if p.scoring_func == "sqrtsoftplus":
        return 1.0 / (1.0 + np.exp(-z)) / (2.0 * np.maximum(s, STEEP))
    if p.score_passes == 1:
        return s * (1.0 - s)
    first = reference._score(z, p.scoring_func)
    return s * (1.0 - s) * first * (1.0 - first)
