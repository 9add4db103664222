"""Golden rows against found rows: which differ, which may, and by how much. Pure; see `Rows`.

Letters: T tokens, L routers, K picked. A relative margin is the golden margin as a share of the
score at the cut (of scores), or what it makes of that score (of logits: 1 − exp(−margin)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.spec import RouterSpec

KINDS = ("experts", "order", "score_sum", "weights", "valid")
KEPT = 3  # rows remembered of each kind and router

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """One recorded sequence. None: not recorded."""

    sequence: int
    prompt: int  # tokens that were a prompt
    token_ids: NDArray[np.int32]  # [T]
    logprob: NDArray[np.float64]  # [T]
    expert_ids: NDArray[np.int16]  # [T, L, K]
    weights: Floats | None  # [T, L, K]
    scores: Floats | None  # [T, L, K]
    score_sum: Floats  # [T, L]
    margin: Floats  # [T, L]
    ranked: bool  # ids are in rank order


@dataclass(frozen=True, slots=True)
class Row:
    """One row that does not comply: where, and (margin, expected, found)."""

    kind: str
    sequence: int
    position: int
    router: int
    words: tuple[float, str, str]


@dataclass(slots=True, eq=False)
class Rows:
    """Counts per router [L], filled by `compare`."""

    routers: int
    margin: float
    rows: NDArray[np.int64] = field(init=False)
    near_ties: NDArray[np.int64] = field(init=False)
    flips: NDArray[np.int64] = field(init=False)
    ordered: NDArray[np.int64] = field(init=False)  # rows whose order was compared
    weighed: NDArray[np.int64] = field(init=False)
    failed: dict[str, NDArray[np.int64]] = field(init=False)
    largest_sum: Floats = field(init=False)
    largest_weight: Floats = field(init=False)
    first: dict[tuple[str, int], list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = np.zeros(self.routers, np.int64)
        self.rows, self.near_ties, self.flips = zeros.copy(), zeros.copy(), zeros.copy()
        self.ordered, self.weighed = zeros.copy(), zeros.copy()
        self.failed = {kind: zeros.copy() for kind in KINDS}
        self.largest_sum = np.full(self.routers, np.nan)
        self.largest_weight = np.full(self.routers, np.nan)

    def examples(self) -> list[Row]:
        """The remembered rows, earliest first; of one place in the order of `KINDS`."""
        every = [row for kept in self.first.values() for row in kept]
        return sorted(every, key=lambda r: (r.sequence, r.position, r.router, KINDS.index(r.kind)))

    def of(self, kind: str) -> NDArray[np.int64]:
        """How many rows were compared in this respect."""
        return {"order": self.ordered, "score_sum": self.weighed, "weights": self.weighed}.get(
            kind, self.rows
        )


def relative_margin(
    margin: Floats, scores: Floats | None, ids: NDArray[np.int16], specs: Sequence[RouterSpec]
) -> Floats:
    """Golden margins as shares of the score at the cut. [T, L] -> [T, L].

    Where a bias helps to select, the score at the cut may be next to nothing and says nothing of
    the margin, which holds the bias too: there it is a share of the mean score of the selected.
    Without scores a margin of scores stays as it is, which excuses more. NaN stays NaN.
    """
    by_logit = np.array([spec.margin_unit == "logit" for spec in specs])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        of_logits = -np.expm1(-margin.astype(np.float64))
        cut = np.ones(margin.shape)
        if scores is not None:
            used, size = ids >= 0, np.abs(scores.astype(np.float64))
            lowest = np.where(used, size, np.inf).min(axis=2)
            mean = np.where(used, size, 0.0).sum(axis=2) / used.sum(axis=2)
            biased = np.array([spec.policy.correction_bias != "none" for spec in specs])
            scale = np.where(biased, mean, lowest)
            cut = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        return np.asarray(np.where(by_logit, of_logits, margin / cut))


def compare(
    rows: Rows, golden: Golden, found: Any, specs: Sequence[RouterSpec], tolerance: Any
) -> None:
    """Add the rows of one sequence. `found` is a `forced.Forced` of the same tokens."""
    ids, ours = golden.expert_ids, found.expert_ids
    match = (ids[:, :, :, None] == ours[:, :, None, :]) & (ids >= 0)[:, :, :, None]  # [T, L, K, K']
    counts, our_counts = (ids >= 0).sum(2), (ours >= 0).sum(2)
    decided = counts > 0  # what the golden could not decide is not asked for
    lost = decided & (our_counts == 0)
    both = decided & (our_counts > 0)
    same = both & (match.sum((2, 3)) == counts) & (counts == our_counts)
    margin = relative_margin(golden.margin, golden.scores, ids, specs)
    with np.errstate(invalid="ignore"):
        near = margin < tolerance.margin
    rows.rows += decided.sum(0)
    rows.near_ties += (near & decided).sum(0)
    rows.flips += (both & ~same).sum(0)
    bad = {"valid": lost, "experts": both & ~same & ~near}
    if golden.ranked:
        rows.ordered += same.sum(0)
        bad["order"] = same & ~_same_order(golden, ours, tolerance.margin, specs)
    if golden.weights is not None:
        weighed = same & np.isfinite(golden.weights).all(2)
        rows.weighed += weighed.sum(0)
        sums, weights = _errors(golden, found, match)
        rows.largest_sum = _larger(rows.largest_sum, sums, weighed)
        rows.largest_weight = _larger(rows.largest_weight, weights, weighed)
        bad["score_sum"] = weighed & ~(sums <= tolerance.score_sum)
        bad["weights"] = weighed & ~(weights <= tolerance.weight)
    for kind, wrong in bad.items():
        rows.failed[kind] += wrong.sum(0)
        for router in np.flatnonzero(wrong.any(0)).tolist():
            kept = rows.first.setdefault((kind, router), [])
            for position in np.flatnonzero(wrong[:, router])[: KEPT - len(kept)].tolist():
                words = _words(kind, golden, found, position, router)
                place = (golden.sequence, position, router)
                kept.append(Row(kind, *place, (float(margin[position, router]), *words)))


def _same_order(
    golden: Golden, ours: NDArray[np.int16], epsilon: float, specs: Sequence[RouterSpec]
) -> NDArray[np.bool_]:
    """Ranks alike, or exchanged only among experts whose golden scores are within ε of each other.
    Where a bias helps to select, ranks are not those of the scores, and nothing is excused."""
    ids = golden.expert_ids
    width = min(ids.shape[2], ours.shape[2])
    alike = ids[:, :, :width] == ours[:, :, :width]
    if golden.scores is None:
        return np.asarray(alike.all(2))
    scores = golden.scores[:, :, :width].astype(np.float64)
    # What the golden gave the expert that stands here in our run.
    given = np.where(
        ours[:, :, :width, None] == ids[:, :, None, :width], scores[:, :, None, :], 0.0
    ).sum(3)
    with np.errstate(invalid="ignore"):
        close = np.abs(given - scores) <= epsilon * np.abs(scores)
    unbiased = np.array([spec.policy.correction_bias == "none" for spec in specs])
    return np.asarray((alike | (close & unbiased[None, :, None])).all(2))


def _errors(golden: Golden, found: Any, match: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """How far Σ and the weights are off, as shares of the golden row's Σ of magnitudes. [T, L]."""
    assert golden.weights is not None
    weights = golden.weights.astype(np.float64)
    of_ours = np.where(match, found.weights[:, :, None, :].astype(np.float64), 0.0).sum(3)
    size = np.maximum(np.abs(weights).sum(2), 1e-30)
    sums = np.abs(found.score_sum.astype(np.float64) - golden.score_sum) / size
    return np.asarray(sums), np.asarray(np.abs(of_ours - weights).max(2) / size)


def _larger(so_far: Floats, errors: Floats, where: NDArray[np.bool_]) -> Floats:
    if not len(errors):
        return so_far
    largest = np.where(where.any(0), np.where(where, errors, -1.0).max(0), np.nan)
    return np.asarray(np.fmax(so_far, largest))


def _words(kind: str, golden: Golden, found: Any, t: int, router: int) -> tuple[str, str]:
    """What was expected and what was found, for people."""
    if kind == "score_sum":
        return f"{golden.score_sum[t, router]:.6g}", f"{found.score_sum[t, router]:.6g}"
    ids = [int(e) for e in golden.expert_ids[t, router] if e >= 0]
    ours = [int(e) for e in found.expert_ids[t, router] if e >= 0]
    if kind == "weights":
        assert golden.weights is not None
        pairs = zip(golden.expert_ids[t, router], golden.weights[t, router], strict=True)
        expected = {int(e): float(w) for e, w in pairs if e >= 0}
        given = dict(zip(ours, found.weights[t, router].tolist(), strict=False))
        worst = max(expected, key=lambda e: abs(expected[e] - given.get(e, 0.0)))
        return f"E{worst} {expected[worst]:.6g}", f"E{worst} {given.get(worst, 0.0):.6g}"
    if kind == "experts":
        gone, come = sorted(set(ids) - set(ours)), sorted(set(ours) - set(ids))
        return " ".join(f"E{e}" for e in gone) or "-", " ".join(f"E{e}" for e in come) or "-"
    return " ".join(f"E{e}" for e in ids), " ".join(f"E{e}" for e in ours) or "no decision"
