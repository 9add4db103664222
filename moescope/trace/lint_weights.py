"""The rules of `lint` about weights, sums and margins, one function each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from moescope.trace import measures
from moescope.trace.lint import ERROR, WARNING, Finding, Rows

WHOLE = 0.95  # of rows: above it, Σ being all there is is no chance


def weight_sums(rows: Rows) -> Iterator[Finding]:
    """Σ against what the recorded router allows. One factor between them everywhere is a scale."""
    if rows.weights is None:
        return
    allowed = [None if spec is None else spec.allowed_score_sum() for spec in rows.specs]
    dtype = str(rows.meta.engine.get("dtype", "float32"))
    dtype = dtype if dtype in measures.UNIT else "float32"
    sums = rows.weights.sum(axis=2, dtype=np.float64)
    sums = np.where((rows.expert_ids >= 0).any(2), sums, np.nan)
    wrong = measures.sum_violations(sums, allowed, dtype=dtype)
    seen = "Σ is not what the router allows"
    for router, rule in enumerate(allowed):
        if isinstance(rule, float) and rule and wrong[:, router].mean() > 0.9:
            factor = sums[:, router] / rule
            if np.nanstd(factor) < 1e-3 * abs(np.nanmean(factor)):
                seen = f"Σ is {np.nanmean(factor):.4g} times what the router allows, everywhere"
    yield from rows.found(
        "weight_sums",
        ERROR,
        wrong,
        seen,
        "another router ran, a scale was applied elsewhere, or weights are not what was multiplied",
        "moescope diagnose TRACE --model MODEL names the router that made it",
    )


def whole_sums(rows: Rows) -> Iterator[Finding]:
    """Σ is all there is in nearly every row of a router that leaves scores out: only where one or
    few experts have all the score is that right, and a router seldom is so sure."""
    if rows.weights is None or len(rows.position) < 16:
        return
    sums = rows.weights.sum(axis=2, dtype=np.float64)
    whole = np.zeros(sums.shape, np.bool_)
    for router, spec in enumerate(rows.specs):
        rule = None if spec is None else spec.allowed_score_sum()
        if isinstance(rule, tuple) and math.isfinite(rule[1]):
            near = np.abs(sums[:, router] - rule[1]) < 2e-3 * abs(rule[1])
            whole[:, router] = near & (near.mean() > WHOLE)
    yield from rows.found(
        "whole_sums",
        ERROR,
        whole,
        "Σ is whole in nearly every row of a router that is not renormalised",
        "a softmax over the selected experts, or a renormalisation that training did not have",
        "moescope diagnose TRACE --model MODEL names the router that made it",
    )


def recorded_sums(rows: Rows) -> Iterator[Finding]:
    """`score_sum` is the sum of the weights beside it."""
    if rows.weights is None or "score_sum" in rows.meta.absent:
        return
    sums = np.where(rows.expert_ids >= 0, rows.weights, 0.0).sum(axis=2, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        off = np.abs(sums - rows.score_sum) > 1e-3 * np.maximum(1.0, np.abs(sums))
    yield from rows.found(
        "recorded_sums",
        ERROR,
        off & np.isfinite(rows.score_sum),
        "score_sum is not the sum of the weights",
        "the two were recorded at different places",
        "record both where the experts are multiplied",
    )


def selection_scores(rows: Rows) -> Iterator[Finding]:
    """Weights that no combine weight can be: negative, although the router's scores are positive.
    Selection scores hold a bias, which may be negative."""
    if rows.weights is None:
        return
    positive = np.array(
        [spec is not None and spec.policy.weights_from == "scores" for spec in rows.specs]
    )
    negative = ((rows.weights < 0) & (rows.expert_ids >= 0)).any(2) & positive[None]
    said = rows.meta.weights_kind == "selection"
    yield from rows.found(
        "selection_scores",
        WARNING if said else ERROR,
        negative,
        "a weight is negative",
        "selection scores (with the correction bias) were recorded as weights",
        "record the factors that the experts are multiplied with",
    )


def ranked_weights(rows: Rows) -> Iterator[Finding]:
    """Weights that rise with the rank, in a router without a bias: one of the two is mixed up."""
    if rows.weights is None or not rows.meta.rank_ordered:
        return
    plain = np.array(
        [
            spec is not None
            and spec.policy.correction_bias == "none"
            and spec.policy.weights_from == "scores"
            and not spec.policy.per_expert_scale
            for spec in rows.specs
        ]
    )
    used = rows.expert_ids[..., 1:] >= 0
    slack = 1e-2 * np.abs(rows.weights[..., :-1]) + 1e-6
    rising = (used & (rows.weights[..., 1:] > rows.weights[..., :-1] + slack)).any(2) & plain[None]
    many = rising.mean() > 0.02
    yield from rows.found(
        "ranked_weights",
        WARNING,
        rising & many,
        "a lower rank weighs more",
        "ids and weights are in different orders, or the steered lane was forced",
        "sort both alike before recording",
    )


def runner_up_picked(rows: Rows) -> Iterator[Finding]:
    """The first expert that was not chosen is not one that was, and margins are not negative."""
    among = (rows.runner_up[..., None] == rows.expert_ids) & (rows.runner_up >= 0)[..., None]
    with np.errstate(invalid="ignore"):
        bad = among.any(2) | (rows.margin < 0)
    yield from rows.found(
        "runner_up",
        ERROR,
        np.asarray(bad),
        "the runner-up was chosen, or its margin is negative",
        "ranks were recorded before the choice was final",
        "record the margin of the values that selection is made in",
    )
