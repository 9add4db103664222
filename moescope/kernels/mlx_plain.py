"""The router in plain MLX operators: any policy, read from rows of numbers; Metal's slow twin.

Everything runs on the CPU's stream, on a Mac too, where memory is shared: there float64 exists, so
the steps and rounding points are those of `reference.py` and what holds for it holds here. Of
MLX's functions none is used whose error would show: its exponential is a float32 one even for
float64, so powers of e stand in for it; its sorts promise nothing about ties, so values are sorted
as integers with the id in the low bits.

Letters: R rows (T tokens times P policies), E expert classes, K picks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.kernels.policy_rows import COLUMN, WIDTH
from moescope.kernels.spec import Routing

ALL = frozenset(COLUMN)
_INF, _NAN = math.inf, math.nan
# What a column holds where its step can be left out; for those not named, nothing is left out.
_IDLE: dict[str, float] = {
    "logits_dtype": 0,
    "router_logit_scale": 1,
    "router_logit_softcapping": 0,
    "scoring_func": 0,
    "score_order": 0,
    "score_passes": 1,
    "score_dtype": 0,
    "correction_bias": 0,
    "n_group": 1,
    "tie_break": 0,
    "weights_from": 0,
    "norm_p": 1,
    "norm_eps_mode": 0,
    "per_expert_scale": 0,
    "weight_scale": 1,
    "combine_dtype": 0,
    "hash_table": 0,
}


def fields_of(rows: NDArray[np.floating], E: int) -> frozenset[str]:
    """The columns of rows [..., 32] whose steps `route_plain` may not leave out: a static word for
    what is traced, while the rows themselves stay data."""
    rows = np.asarray(rows).reshape(-1, WIDTH)
    found = {name for name, idle in _IDLE.items() if (rows[:, COLUMN[name]] != idle).any()}
    if (rows[:, COLUMN["weightless_from"]] < E).any():
        found.add("weightless_from")
    return frozenset(found)


class _Row:
    """The policies of R rows: a column is an array [R, 1] float32; `has` says whether a step may be
    left out of what is traced."""

    def __init__(self, rows: mx.array, fields: frozenset[str]) -> None:
        self._columns: Sequence[mx.array] = mx.split(rows.astype(mx.float32), WIDTH, axis=-1)
        self._fields = fields

    def has(self, name: str) -> bool:
        return name in self._fields

    def __getattr__(self, name: str) -> mx.array:
        return self._columns[COLUMN[name]]

    def after(self) -> mx.array:
        return self.score_order == 1

    def sparse(self) -> mx.array:
        return self.scoring_func == 3


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
        p, slot = _Row(rows, fields), _places(n, np.int32)
        K = p.num_experts_per_tok.astype(mx.int32)
        fits = _fits(p, K, E, n, bias, scale, hashed)
        z, finite = _prepared(logits, p)
        excluded = z == -_INF
        exact, scores = _score_all(_wide(z), excluded, p)
        entropy = _entropy(exact)

        b = None if bias is None else _round(bias, p.correction_bias_dtype)
        biased = _biased(z, scores, excluded, b, p)
        values = _limit_groups(biased, p) if p.has("n_group") else biased
        ids, above, below, runner_up = _choose(values, K, n, p)
        usable = above > -_INF
        if p.has("correction_bias") or p.has("scoring_func"):  # softmaxes are never infinite
            usable = usable & (_top(biased) < _INF)
        absent = (below == -_INF) | (K >= E)
        margin = _wide(above) - _wide(below)
        if p.has("hash_table"):
            ids, usable, absent = _hashed(ids, usable, absent, excluded, hashed, K, p)
        valid = fits & finite & usable
        used = slot < K

        z_picked = mx.where(used, _take(z, ids), -_INF)
        picked = _selected_scores(z, z_picked, scores, ids, p)
        w = _unnormalised(z_picked, biased, picked, b, ids, used, p)
        w = mx.where(used, _wide(w), 0.0)
        w = mx.where(p.norm_topk_prob != 0, _normalised(w, K, p), w)
        if scale is not None and p.has("per_expert_scale"):
            factor = _wide(_take(scale.astype(mx.float32), ids))
            w = mx.where(p.per_expert_scale != 0, w * factor, w)
        if p.has("weight_scale"):
            w = w * _wide(p.weight_scale)
        if p.has("weightless_from"):
            w = mx.where(ids >= p.weightless_from, 0.0, w)
        weights = _round(w, p.combine_dtype) if p.has("combine_dtype") else w.astype(mx.float32)

        kept = used & valid
        weights = mx.where(kept, weights, 0.0)
        picked = mx.where(kept, picked, mx.where(used, _NAN, 0.0))
        return Routing(
            expert_ids=_padded(mx.where(kept, ids, -1).astype(mx.int32), K_max, -1),
            scores=_padded(picked, K_max, 0.0),
            weights=_padded(weights, K_max, 0.0),
            score_sum=_single(_sum(_wide(weights)), valid),
            mass=_single(_sum(_wide(picked)), valid),
            entropy=_single(entropy, valid),
            margin=_single(margin, valid & ~absent),
            runner_up=mx.where(valid & ~absent, runner_up, -1).astype(mx.int32).squeeze(-1),
        )


def _fits(
    p: _Row,
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
        within = (within | (_places(m, np.int32) >= K)).all(-1, keepdims=True) & (m >= K)
        good = good & (within | (p.hash_table == 0))
    return good


# --- from logits to selection values, each the twin of a function of reference.py -----------------


def _prepared(logits: mx.array, p: _Row) -> tuple[mx.array, mx.array]:
    """Logits as scored [R, E] float32, and whether a row has neither NaN nor +inf [R, 1]."""
    z = logits.astype(mx.float32)
    if p.has("logits_dtype"):
        z = _round(z, p.logits_dtype)
    if p.has("router_logit_scale"):
        z = (_wide(z) * _wide(p.router_logit_scale)).astype(mx.float32)
    finite = _top(_wide(z)) < _INF
    if p.has("router_logit_softcapping"):
        cap = _wide(p.router_logit_softcapping)
        capped = cap * mx.tanh(_wide(z) / mx.where(cap == 0, 1.0, cap))
        z = mx.where((cap == 0) | (z == -_INF), z, capped.astype(mx.float32))
    return z, finite


def _score_all(z: mx.array, excluded: mx.array, p: _Row) -> tuple[mx.array, mx.array]:
    """Scores over the last axis, float64 and rounded to `score_dtype` as float32."""
    exact = _score(z, p)
    rounded = _scored(exact, p)
    if p.has("score_passes"):
        twice = p.score_passes == 2
        again = _score(mx.where(excluded, -_INF, _wide(rounded)), p)
        exact = mx.where(twice, again, exact)
        rounded = mx.where(twice, _scored(again, p), rounded)
    return exact, rounded


def _scored(exact: mx.array, p: _Row) -> mx.array:
    return _round(exact, p.score_dtype) if p.has("score_dtype") else exact.astype(mx.float32)


def _score(z: mx.array, p: _Row) -> mx.array:
    e = _exp(z - _top(z))
    softmax = e / _sum(e)
    if not p.has("scoring_func"):
        return softmax
    small = _exp(-mx.abs(z))
    sigmoid = mx.where(z >= 0, 1.0, small) / (1.0 + small)
    sigmoid = mx.where(mx.isnan(z), z, sigmoid)
    root = mx.sqrt(mx.maximum(z, 0.0) + mx.log1p(small))
    func = p.scoring_func
    return mx.where(func == 1, sigmoid, mx.where(func == 2, root, softmax))


def _entropy(exact: mx.array) -> mx.array:
    """Nats [R, 1], of scores that need not sum to 1; NaN where they sum to nothing."""
    share = exact / _sum(exact)
    return -_sum(mx.where(share > 0, share * mx.log(share), share))


def _biased(
    z: mx.array, scores: mx.array, excluded: mx.array, b: mx.array | None, p: _Row
) -> mx.array:
    """Selection values before groups [R, E] float32; -inf where a class is excluded."""
    by_logit = p.after() | p.sparse()
    choosing = p.has("score_order") or p.has("scoring_func")
    values = mx.where(by_logit, z, scores) if choosing else scores
    if p.has("correction_bias") and b is not None:
        on_score = _round(_wide(scores) + _wide(b), p.biased_dtype)
        with_bias = (_wide(z) + _wide(b)).astype(mx.float32)
        on_logit = mx.where(by_logit, with_bias, _score_all(_wide(with_bias), excluded, p)[1])
        site = p.correction_bias
        values = mx.where(site == 1, on_score, mx.where(site == 2, on_logit, values))
    return mx.where(excluded, -_INF, values)


def _limit_groups(biased: mx.array, p: _Row) -> mx.array:
    """Mask all but the best `topk_group` groups of sizes that rows may differ in."""
    E = biased.shape[1]
    groups = mx.clip(p.n_group, 1, E).astype(mx.int64)
    size = E // groups
    place = _places(E, np.int64)
    group = mx.minimum(place // size, groups - 1)  # of each class
    # classes by group, then by value: the best two of each group stand first in it
    order = mx.sort(group * 2**32 + _descending(biased) + 2**31, axis=-1)
    start = mx.minimum(place * size, E - 1)  # of each group
    first, second = (
        _value(_take(order, mx.minimum(start + i, E - 1)) % 2**32 - 2**31) for i in range(2)
    )
    two = _round(_wide(first) + _wide(mx.where(size > 1, second, 0.0)), p.biased_dtype)
    score = mx.where(p.group_score == 1, two, first)
    flipped = mx.where(p.tie_break == 1, E - 1 - place, place)
    keys = mx.where(place < groups, _descending(score) * 2**12 + flipped, 2**62)
    cut = _take(mx.sort(keys, axis=-1), mx.clip(p.topk_group - 1, 0, E - 1).astype(mx.int64))
    allowed = _take(keys, group) <= cut
    fill = mx.where(p.group_mask_fill == 1, 0.0, -_INF)
    masked = mx.where(allowed | (biased == -_INF), biased, fill)
    return mx.where(p.n_group > 1, masked, biased)


# --- from selection values to experts and weights -------------------------------------------------


def _choose(
    values: mx.array, K: mx.array, n: int, p: _Row
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Ids [R, n], the values at ranks K and K+1 and who stands there, each [R, 1]."""
    E = values.shape[1]
    place = _places(E, np.int64)
    if p.has("tie_break"):
        place = mx.where(p.tie_break == 1, E - 1 - place, place)
    order = mx.sort(_descending(values) * 2**12 + place, axis=-1)[:, : n + 1]
    ids = order & (2**12 - 1)
    if p.has("tie_break"):
        ids = mx.where(p.tie_break == 1, E - 1 - ids, ids)
    ranked, most = _take(values, ids), ids.shape[1] - 1
    next_ = mx.clip(K, 0, most)
    above, below = _take(ranked, mx.clip(K - 1, 0, most)), _take(ranked, next_)
    return ids[:, :n], above, below, _take(ids, next_)


def _hashed(
    ids: mx.array,
    usable: mx.array,
    absent: mx.array,
    excluded: mx.array,
    hashed: mx.array | None,
    K: mx.array,
    p: _Row,
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
    z: mx.array, z_picked: mx.array, scores: mx.array, ids: mx.array, p: _Row
) -> mx.array:
    """Unbiased scores of the selected [R, n] float32."""
    picked = _take(scores, ids)
    if p.has("score_order"):
        after = _score_all(_wide(z_picked), z_picked == -_INF, p)[1]
        picked = mx.where(p.after(), after, picked)
    if p.has("scoring_func") and ids.shape[1] > 1:
        picked = mx.where(p.sparse(), _sparsemixer(z, ids, p), picked)
    return picked


def _sparsemixer(z: mx.array, ids: mx.array, p: _Row) -> mx.array:
    """Two softmaxes, each over the logits near its own maximum (arXiv 2409.12136, inference)."""
    z, place = _wide(z), _places(z.shape[1], np.int64)
    scores, left = [], z
    for k in range(2):
        id = ids[:, k : k + 1]
        top = _take(z, id)
        gap = _wide(_round(top - z, p.score_dtype))
        distance = _round(gap / mx.maximum(mx.abs(z), top), p.score_dtype)
        kept = mx.where(distance > p.sparsemixer_threshold, -_INF, left)
        scores.append(_round(1.0 / _sum(_exp(kept - top)), p.score_dtype))
        left = mx.where(place == id, -_INF, left)
    return mx.pad(mx.concatenate(scores, axis=-1), [(0, 0), (0, ids.shape[1] - 2)])


def _unnormalised(
    z_picked: mx.array,
    biased: mx.array,
    scores: mx.array,
    b: mx.array | None,
    ids: mx.array,
    used: mx.array,
    p: _Row,
) -> mx.array:
    """What `weights_from` names, for the selected [R, n] float32."""
    if not p.has("weights_from"):
        return scores
    from_biased = mx.where(used, _take(biased, ids), -_INF)
    if p.has("score_order"):
        after = _score_all(_wide(from_biased), from_biased == -_INF, p)[1]
        from_biased = mx.where(p.after(), after, from_biased)
    source = p.weights_from
    w = mx.where(source == 3, z_picked, mx.where(source == 0, scores, from_biased))
    if b is not None:
        less = _round(_wide(from_biased) - _wide(_take(b, ids)), p.biased_dtype)
        w = mx.where(source == 2, less, w)
    return w


def _normalised(w: mx.array, K: mx.array, p: _Row) -> mx.array:
    """w [R, n] float64 over its sum or p-norm; what is unused is 0."""
    total, eps = _sum(w), _wide(p.norm_eps)
    if p.has("norm_p"):
        exponent = _wide(p.norm_p)
        size = mx.abs(w)
        powers = _sum(mx.where(size > 0, mx.power(size, exponent), size))
        total = mx.where(exponent == 1, total, mx.power(powers, 1.0 / exponent))
    if not p.has("norm_eps_mode"):
        return w / (total + eps)
    mode = p.norm_eps_mode
    normalised = w / mx.where(mode == 1, mx.maximum(total, eps), total + eps)
    return mx.where((mode == 2) & (total == 0), 1.0 / _wide(K), normalised)


# --- numbers --------------------------------------------------------------------------------------


def _wide(x: mx.array) -> mx.array:
    return x.astype(mx.float64)


def _places(n: int, dtype: type) -> mx.array:
    """0 to n - 1 as [1, n]: a constant of what is traced."""
    return mx.array(np.arange(n, dtype=dtype)[None])


def _top(x: mx.array) -> mx.array:
    """The greatest of a row, or NaN if there is one."""
    return x.max(-1, keepdims=True)


def _sum(x: mx.array) -> mx.array:
    return x.sum(-1, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """e^x in float64: MLX's own exponential goes through float32."""
    return mx.power(mx.array(math.e, dtype=mx.float64), x)


def _round(x: mx.array, dtype: mx.array) -> mx.array:
    """`x` rounded to the dtype at that place of `policy_rows.DTYPES`, as float32; through float32
    first, as the reference does."""
    single = x.astype(mx.float32)
    halves = [single.astype(narrow).astype(mx.float32) for narrow in (mx.bfloat16, mx.float16)]
    return mx.where(dtype == 1, halves[0], mx.where(dtype == 2, halves[1], single))


def _descending(x: mx.array) -> mx.array:
    """float32 as int64 in the opposite order, within 32 bits; both zeros are one number."""
    bits = mx.where(x == 0, 0.0, x).view(mx.int32)
    return -1 - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(mx.int64)


def _value(key: mx.array) -> mx.array:
    """The float32 that `_descending` made `key` of."""
    bits = (-1 - key).astype(mx.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(mx.float32)


def _take(x: mx.array, at: mx.array) -> mx.array:
    """x [1 or R, n] at places [R, m]. Places must be within bounds: MLX does not look."""
    x = mx.broadcast_to(x, (len(at), x.shape[1])) if len(x) != len(at) else x
    return mx.take_along_axis(x, at, axis=-1)


def _padded(x: mx.array, width: int, value: float) -> mx.array:
    if x.shape[1] == width:
        return x
    return mx.pad(x, [(0, 0), (0, width - x.shape[1])], constant_values=value)


def _single(x: mx.array, valid: mx.array) -> mx.array:
    return mx.where(valid, x, _NAN).astype(mx.float32).squeeze(-1)
