"""The router in plain MLX operators: any policy, read from rows of numbers; Metal's slow twin.

Everything runs on the CPU's stream, on a Mac too, where memory is shared: there float64 exists, so
the steps and rounding points are those of `reference.py` and what holds for it holds here.

Letters: R rows (T tokens times P policies), E expert classes, K picks.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from moescope.kernels.mlx_numbers import (
    descending,
    exp,
    padded,
    places,
    rounded,
    single,
    sum_of,
    take,
    top_of,
    value_of,
    wide,
)
from moescope.kernels.mlx_policy import ALL, Row
from moescope.kernels.spec import Routing

_INF, _NAN = math.inf, math.nan


def route_plain(
    logits: mx.array,
    rows: mx.array,
    K_max: int,
    bias: mx.array | None,
    scale: mx.array | None,
    hashed: mx.array | None,
    fields: frozenset[str] = ALL,
) -> Routing:
    """Route logits [R, E] under rows [R, 32]; vectors [1 or R, E], hash ids [R, K or more].

    A policy that does not fit (see `_fits`) makes its row invalid. `fields` as `fields_of` gives
    it; steps of other columns are not traced.
    """
    with mx.stream(mx.cpu):
        E, n = logits.shape[1], min(K_max, logits.shape[1])
        p, slot = Row(rows, fields), places(n, np.int32)
        K = p.num_experts_per_tok.astype(mx.int32)
        fits = _fits(p, K, E, n, bias, scale, hashed)
        z, finite = _prepared(logits, p)
        excluded = z == -_INF
        exact, scores = _score_all(wide(z), excluded, p)
        entropy = _entropy(exact)

        b = None if bias is None else rounded(bias, p.correction_bias_dtype)
        biased = _biased(z, scores, excluded, b, p)
        values = _limit_groups(biased, p) if p.has("n_group") else biased
        ids, above, below, runner_up = _choose(values, K, n, p)
        usable = above > -_INF
        if p.has("correction_bias") or p.has("scoring_func"):  # softmaxes are never infinite
            usable = usable & (top_of(biased) < _INF)
        absent = (below == -_INF) | (K >= E)
        margin = wide(above) - wide(below)
        if p.has("hash_table"):
            ids, usable, absent = _hashed(ids, usable, absent, excluded, hashed, K, p)
        valid = fits & finite & usable
        used = slot < K

        z_picked = mx.where(used, take(z, ids), -_INF)
        picked = _selected_scores(z, z_picked, scores, ids, p)
        w = _unnormalised(z_picked, biased, picked, b, ids, used, p)
        w = mx.where(used, wide(w), 0.0)
        w = mx.where(p.norm_topk_prob != 0, _normalised(w, K, p), w)
        if scale is not None and p.has("per_expert_scale"):
            factor = wide(take(scale.astype(mx.float32), ids))
            w = mx.where(p.per_expert_scale != 0, w * factor, w)
        if p.has("weight_scale"):
            w = w * wide(p.weight_scale)
        if p.has("weightless_from"):
            w = mx.where(ids >= p.weightless_from, 0.0, w)
        weights = rounded(w, p.combine_dtype) if p.has("combine_dtype") else w.astype(mx.float32)

        kept = used & valid
        weights = mx.where(kept, weights, 0.0)
        picked = mx.where(kept, picked, mx.where(used, _NAN, 0.0))
        return Routing(
            expert_ids=padded(mx.where(kept, ids, -1).astype(mx.int32), K_max, -1),
            scores=padded(picked, K_max, 0.0),
            weights=padded(weights, K_max, 0.0),
            score_sum=single(sum_of(wide(weights)), valid),
            mass=single(sum_of(wide(picked)), valid),
            entropy=single(entropy, valid),
            margin=single(margin, valid & ~absent),
            runner_up=mx.where(valid & ~absent, runner_up, -1).astype(mx.int32).squeeze(-1),
        )


def _fits(
    p: Row,
    K: mx.array,
    E: int,
    n: int,
    bias: mx.array | None,
    scale: mx.array | None,
    hashed: mx.array | None,
) -> mx.array:
    """Whether nothing a row asks for is missing, and its numbers are within bounds. [R, 1]"""
    good = (K > 0) & (n >= K)
    if p.has("score_passes"):
        good = good & ((p.score_passes == 1) | (p.score_passes == 2))
    if p.has("n_group"):
        groups, keep = p.n_group, p.topk_group
        size = mx.floor(E / mx.maximum(groups, 1))
        good = good & (groups >= 1) & (size * groups == E) & (keep >= 1) & (keep <= groups)
    if p.has("scoring_func"):
        good = good & ((K == 2) | ~p.sparse())
    if p.has("correction_bias") and bias is None:
        good = good & (p.correction_bias == 0)
    if p.has("per_expert_scale") and scale is None:
        good = good & (p.per_expert_scale == 0)
    if p.has("hash_table"):
        if hashed is None:
            return good & (p.hash_table == 0)
        m = min(n, hashed.shape[1])
        within = (hashed[:, :m] >= 0) & (hashed[:, :m] < E)
        within = (within | (places(m, np.int32) >= K)).all(-1, keepdims=True) & (m >= K)
        good = good & (within | (p.hash_table == 0))
    return good


# --- from logits to selection values, each the twin of a function of reference.py -----------------


def _prepared(logits: mx.array, p: Row) -> tuple[mx.array, mx.array]:
    """Logits as scored [R, E] float32, and whether a row has neither NaN nor +inf [R, 1]."""
    z = logits.astype(mx.float32)
    if p.has("logits_dtype"):
        z = rounded(z, p.logits_dtype)
    if p.has("router_logit_scale"):
        z = (wide(z) * wide(p.router_logit_scale)).astype(mx.float32)
    finite = top_of(wide(z)) < _INF
    if p.has("router_logit_softcapping"):
        cap = wide(p.router_logit_softcapping)
        capped = cap * mx.tanh(wide(z) / mx.where(cap == 0, 1.0, cap))
        z = mx.where((cap == 0) | (z == -_INF), z, capped.astype(mx.float32))
    return z, finite


def _score_all(z: mx.array, excluded: mx.array, p: Row) -> tuple[mx.array, mx.array]:
    """Scores over the last axis, float64 and rounded to `score_dtype` as float32."""
    exact = _score(z, p)
    rounded = _scored(exact, p)
    if p.has("score_passes"):
        twice = p.score_passes == 2
        again = _score(mx.where(excluded, -_INF, wide(rounded)), p)
        exact = mx.where(twice, again, exact)
        rounded = mx.where(twice, _scored(again, p), rounded)
    return exact, rounded


def _scored(exact: mx.array, p: Row) -> mx.array:
    return rounded(exact, p.score_dtype) if p.has("score_dtype") else exact.astype(mx.float32)


def _score(z: mx.array, p: Row) -> mx.array:
    e = exp(z - top_of(z))
    softmax = e / sum_of(e)
    if not p.has("scoring_func"):
        return softmax
    small = exp(-mx.abs(z))
    sigmoid = mx.where(z >= 0, 1.0, small) / (1.0 + small)
    sigmoid = mx.where(mx.isnan(z), z, sigmoid)
    root = mx.sqrt(mx.maximum(z, 0.0) + mx.log1p(small))
    func = p.scoring_func
    return mx.where(func == 1, sigmoid, mx.where(func == 2, root, softmax))


def _entropy(exact: mx.array) -> mx.array:
    """Nats [R, 1], of scores that need not sum to 1; NaN where they sum to nothing."""
    share = exact / sum_of(exact)
    return -sum_of(mx.where(share > 0, share * mx.log(share), share))


def _biased(
    z: mx.array, scores: mx.array, excluded: mx.array, b: mx.array | None, p: Row
) -> mx.array:
    """Selection values before groups [R, E] float32; -inf where a class is excluded."""
    by_logit = p.after() | p.sparse()
    choosing = p.has("score_order") or p.has("scoring_func")
    values = mx.where(by_logit, z, scores) if choosing else scores
    if p.has("correction_bias") and b is not None:
        on_score = rounded(wide(scores) + wide(b), p.biased_dtype)
        with_bias = (wide(z) + wide(b)).astype(mx.float32)
        on_logit = mx.where(by_logit, with_bias, _score_all(wide(with_bias), excluded, p)[1])
        site = p.correction_bias
        values = mx.where(site == 1, on_score, mx.where(site == 2, on_logit, values))
    return mx.where(excluded, -_INF, values)


def _limit_groups(biased: mx.array, p: Row) -> mx.array:
    """Mask all but the best `topk_group` groups of sizes that rows may differ in."""
    E = biased.shape[1]
    groups = mx.clip(p.n_group, 1, E).astype(mx.int64)
    size = E // groups
    place = places(E, np.int64)
    group = mx.minimum(place // size, groups - 1)  # of each class
    # classes by group, then by value: the best two of each group stand first in it
    order = mx.sort(group * 2**32 + descending(biased) + 2**31, axis=-1)
    start = mx.minimum(place * size, E - 1)  # of each group
    first, second = (
        value_of(take(order, mx.minimum(start + i, E - 1)) % 2**32 - 2**31) for i in range(2)
    )
    two = rounded(wide(first) + wide(mx.where(size > 1, second, 0.0)), p.biased_dtype)
    score = mx.where(p.group_score == 1, two, first)
    flipped = mx.where(p.tie_break == 1, E - 1 - place, place)
    keys = mx.where(place < groups, descending(score) * 2**12 + flipped, 2**62)
    cut = take(mx.sort(keys, axis=-1), mx.clip(p.topk_group - 1, 0, E - 1).astype(mx.int64))
    allowed = take(keys, group) <= cut
    fill = mx.where(p.group_mask_fill == 1, 0.0, -_INF)
    masked = mx.where(allowed | (biased == -_INF), biased, fill)
    return mx.where(p.n_group > 1, masked, biased)


# --- from selection values to experts and weights -------------------------------------------------


def _choose(
    values: mx.array, K: mx.array, n: int, p: Row
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Ids [R, n], the values at ranks K and K+1 and who stands there, each [R, 1]."""
    E = values.shape[1]
    place = places(E, np.int64)
    if p.has("tie_break"):
        place = mx.where(p.tie_break == 1, E - 1 - place, place)
    order = mx.sort(descending(values) * 2**12 + place, axis=-1)[:, : n + 1]
    ids = order & (2**12 - 1)
    if p.has("tie_break"):
        ids = mx.where(p.tie_break == 1, E - 1 - ids, ids)
    ranked, most = take(values, ids), ids.shape[1] - 1
    next_ = mx.clip(K, 0, most)
    above, below = take(ranked, mx.clip(K - 1, 0, most)), take(ranked, next_)
    return ids[:, :n], above, below, take(ids, next_)


def _hashed(
    ids: mx.array,
    usable: mx.array,
    absent: mx.array,
    excluded: mx.array,
    hashed: mx.array | None,
    K: mx.array,
    p: Row,
) -> tuple[mx.array, mx.array, mx.array]:
    """Ids from the table where a row says so: no rank K+1, and enough logits that are finite."""
    if hashed is None:
        return ids, usable, absent
    on, E, n = p.hash_table != 0, excluded.shape[1], ids.shape[1]
    table = mx.clip(hashed[:, :n].astype(mx.int64), 0, E - 1)  # what is out of range does not fit
    table = mx.pad(table, [(0, 0), (0, n - table.shape[1])])
    enough = excluded.sum(-1, keepdims=True) <= E - K
    return mx.where(on, table, ids), mx.where(on, enough, usable), absent | on


def _selected_scores(
    z: mx.array, z_picked: mx.array, scores: mx.array, ids: mx.array, p: Row
) -> mx.array:
    """Unbiased scores of the selected [R, n] float32."""
    picked = take(scores, ids)
    if p.has("score_order"):
        after = _score_all(wide(z_picked), z_picked == -_INF, p)[1]
        picked = mx.where(p.after(), after, picked)
    if p.has("scoring_func") and ids.shape[1] > 1:
        picked = mx.where(p.sparse(), _sparsemixer(z, ids, p), picked)
    return picked


def _sparsemixer(z: mx.array, ids: mx.array, p: Row) -> mx.array:
    """Two softmaxes, each over the logits near its own maximum (arXiv 2409.12136, inference)."""
    z, place = wide(z), places(z.shape[1], np.int64)
    scores, left = [], z
    for k in range(2):
        id = ids[:, k : k + 1]
        top = take(z, id)
        gap = wide(rounded(top - z, p.score_dtype))
        distance = rounded(gap / mx.maximum(mx.abs(z), top), p.score_dtype)
        kept = mx.where(distance > p.sparsemixer_threshold, -_INF, left)
        scores.append(rounded(1.0 / sum_of(exp(kept - top)), p.score_dtype))
        left = mx.where(place == id, -_INF, left)
    return mx.pad(mx.concatenate(scores, axis=-1), [(0, 0), (0, ids.shape[1] - 2)])


def _unnormalised(
    z_picked: mx.array,
    biased: mx.array,
    scores: mx.array,
    b: mx.array | None,
    ids: mx.array,
    used: mx.array,
    p: Row,
) -> mx.array:
    """What `weights_from` names, for the selected [R, n] float32."""
    if not p.has("weights_from"):
        return scores
    from_biased = mx.where(used, take(biased, ids), -_INF)
    if p.has("score_order"):
        after = _score_all(wide(from_biased), from_biased == -_INF, p)[1]
        from_biased = mx.where(p.after(), after, from_biased)
    source = p.weights_from
    w = mx.where(source == 3, z_picked, mx.where(source == 0, scores, from_biased))
    if b is not None:
        less = rounded(wide(from_biased) - wide(take(b, ids)), p.biased_dtype)
        w = mx.where(source == 2, less, w)
    return w


def _normalised(w: mx.array, K: mx.array, p: Row) -> mx.array:
    """w [R, n] float64 over its sum or p-norm; what is unused is 0."""
    total, eps = sum_of(w), wide(p.norm_eps)
    if p.has("norm_p"):
        exponent = wide(p.norm_p)
        size = mx.abs(w)
        powers = sum_of(mx.where(size > 0, mx.power(size, exponent), size))
        total = mx.where(exponent == 1, total, mx.power(powers, 1.0 / exponent))
    if not p.has("norm_eps_mode"):
        return w / (total + eps)
    mode = p.norm_eps_mode
    normalised = w / mx.where(mode == 1, mx.maximum(total, eps), total + eps)
    return mx.where((mode == 2) & (total == 0), 1.0 / wide(K), normalised)
