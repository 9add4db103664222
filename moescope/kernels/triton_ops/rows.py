"""One row of router logits under one policy, decided by one program: for all routing kernels.

The steps and rounding points are those of `reference.py`. A policy is read at run time, and what it
does not ask for is branched over, so a plain softmax router costs a softmax and its picks.

Why picks and not a sort: with one warp a row, a maximum over int32 keys is one `redux.sync` of some
30 cycles, and two (value, then id) make a pick: K + 1 = 9 picks of 128 experts cost about as much
as 10 of the 28 steps, each a shuffle or two, of a bitonic sort. Where all values fit in 16 bits, as
bfloat16 logits do, value and id share a key and a pick is one `redux.sync`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moescope.kernels.triton_ops import columns as at
from moescope.kernels.triton_ops.arithmetic import (
    LOG2E,
    exp,
    exp_of_difference,
    log1p,
    ordered,
    rounded,
    soft_cap,
    unordered,
)

INF = tl.constexpr(float("inf"))
INF_KEY = tl.constexpr(0x7F800000)
LEAST = tl.constexpr(-(2**31))  # the key of what may not be chosen, below that of -inf
LOW_BITS = tl.constexpr(0xFFFF)
HIGH_BITS = tl.constexpr(-65536)


@triton.jit
def route_row(
    x,  # [E_PAD] float32 logits, -inf beyond E
    policy,  # pointer to a row of policies
    bias,  # pointers to the row's [E], read where HAS_BIAS and HAS_SCALE
    scale,
    hashed,  # pointer to the row's ids in the hash table, read where HASHED
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HASHED: tl.constexpr,
):
    """(ids, scores, weights [K_PAD], score sum, mass, entropy, margin, runner-up), as `Routing`."""
    e, slot = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    K = tl.load(policy + at.NUM_EXPERTS_PER_TOK).to(tl.int32)
    func = tl.load(policy + at.SCORING_FUNC)
    passes = tl.load(policy + at.SCORE_PASSES).to(tl.int32)
    after = tl.load(policy + at.SCORE_ORDER) == 1
    score_dtype = tl.load(policy + at.SCORE_DTYPE)
    site = tl.load(policy + at.CORRECTION_BIAS)
    groups = tl.load(policy + at.N_GROUP).to(tl.int32)
    source = tl.load(policy + at.WEIGHTS_FROM)
    norm = tl.load(policy + at.NORM_TOPK_PROB) != 0
    eps = tl.load(policy + at.NORM_EPS)
    plain_norm = (tl.load(policy + at.NORM_P) == 1) & (tl.load(policy + at.NORM_EPS_MODE) == 0)
    weight_scale = tl.load(policy + at.WEIGHT_SCALE)
    scaled = tl.load(policy + at.PER_EXPERT_SCALE) != 0
    flip = tl.where(tl.load(policy + at.TIE_BREAK) == 1, E_PAD - 1, 0)
    combine_dtype = tl.load(policy + at.COMBINE_DTYPE)
    weightless = tl.load(policy + at.WEIGHTLESS_FROM).to(tl.int32)

    z = _prepared(x, policy)
    # softmax keeps the order of the logits, so its picks need not wait for its sums
    plain = (func == 0) & (passes == 1) & (site == 0) & (groups == 1) & (source == 0)
    plain = plain & plain_norm & (after | (score_dtype == 0)) & (not HASHED) & (not scaled)

    values, scored, biased, last = z, z, z, z
    finite = K > 0
    if not plain:
        by_logit = after | (func == 3)
        scored, last = _score_all(z, func, passes, score_dtype)
        biased = tl.where(by_logit, z, scored)
        if HAS_BIAS:  # noqa: SIM102
            if site != 0:
                b = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
                b = rounded(b, tl.load(policy + at.CORRECTION_BIAS_DTYPE))
                if site == 1:
                    biased = rounded(scored + b, tl.load(policy + at.BIASED_DTYPE))
                else:
                    biased = z + b
                    if not by_logit:
                        biased = _score_some(biased, z == -INF, func, passes, score_dtype)
        wrong = (biased != biased) | (z == INF)
        biased = tl.where(z == -INF, -INF, tl.where(wrong, INF, biased))
        values = biased
        if groups > 1:
            values = _limit_groups(biased, policy, groups, flip, E, E_PAD)
        finite = tl.max(ordered(z if HASHED else values)) < INF_KEY
    entropy, top, total = _entropy(last, func)
    if plain:
        finite = ordered(top) < INF_KEY

    if HASHED:
        ids = tl.load(hashed + slot, mask=slot < K, other=0).to(tl.int32)
        valid = finite & (tl.sum((z > -INF).to(tl.int32)) >= K)
        above = tl.full([], -INF, tl.float32)
        below, runner_up, picked = above, -1, tl.full([K_PAD], 0.0, tl.float32)
    else:
        picked, ids, above, below, runner_up = _pick(values, K, flip, E_PAD, K_PAD)
        valid = finite & (above > -INF)
    used = (slot < K) & valid
    margin = above - below

    if plain:
        w = tl.where(slot < K, exp_of_difference(picked, top), 0.0)
        if after:
            total = tl.sum(w)
        else:  # in scores, and 0 only where the logits are as good as equal
            margin = tl.exp2((above - top) * LOG2E) * (1.0 - tl.exp2(-margin * LOG2E)) / total
        scores = rounded(w * (1.0 / total), score_dtype)
        mass = tl.sum(scores)
        factor = weight_scale
        if norm:
            factor = weight_scale / (mass + eps)
        w = scores * factor
        w = rounded(tl.where(ids >= weightless, 0.0, w), combine_dtype)
        w = tl.where(used, w, 0.0)
        score_sum = tl.sum(w)
    else:
        ids = tl.where(used, ids, 0)
        z_picked = tl.where(used, tl.gather(z, ids, 0), -INF)
        scores = tl.gather(scored, ids, 0)
        if func == 3:
            scores = _sparsemixer(z, ids, policy, score_dtype, E_PAD, K_PAD)
        elif after:
            scores, _ = _score_all(z_picked, func, passes, score_dtype)
        w = scores
        if source == 3:
            w = z_picked
        elif source != 0:
            w = tl.gather(biased, ids, 0)
            if after:
                w, _ = _score_all(tl.where(used, w, -INF), func, passes, score_dtype)
            if HAS_BIAS:  # noqa: SIM102
                if source == 2:
                    b = tl.load(bias + ids).to(tl.float32)
                    b = rounded(b, tl.load(policy + at.CORRECTION_BIAS_DTYPE))
                    w = rounded(w - b, tl.load(policy + at.BIASED_DTYPE))
        scores = tl.where(used, scores, 0.0)
        mass = tl.sum(scores)
        wide = tl.where(used, w, 0.0).to(tl.float64)  # logits may cancel in the sum
        if norm:
            wide = _normalised(wide, used, policy)
        if HAS_SCALE:  # noqa: SIM102
            if scaled:
                wide = wide * tl.load(scale + ids).to(tl.float64)
        wide = wide * weight_scale
        w = rounded(tl.where(ids >= weightless, 0.0, wide).to(tl.float32), combine_dtype)
        w = tl.where(used, w, 0.0)
        score_sum = tl.sum(w.to(tl.float64)).to(tl.float32)

    nan = float("nan")
    absent = (not valid) | (below == -INF)
    ids = tl.where(used, ids, -1)
    scores = tl.where(slot < K, tl.where(valid, scores, nan), 0.0)
    score_sum, mass = tl.where(valid, score_sum, nan), tl.where(valid, mass, nan)
    entropy, margin = tl.where(valid, entropy, nan), tl.where(absent, nan, margin)
    return ids, scores, w, score_sum, mass, entropy, margin, tl.where(absent, -1, runner_up)


@triton.jit
def _prepared(x, policy):
    """Logits as scored: rounded, scaled, capped; +inf for what invalidates the row."""
    z = rounded(tl.where(x == x, x, INF), tl.load(policy + at.LOGITS_DTYPE))
    z = z * tl.load(policy + at.ROUTER_LOGIT_SCALE)
    cap = tl.load(policy + at.ROUTER_LOGIT_SOFTCAPPING)
    if cap != 0:
        z = soft_cap(z, cap)
    return z


@triton.jit
def _score_all(z, func, passes, dtype):
    """Scores of all classes rounded to `dtype`, and what the last pass scored."""
    scores, last = z, z
    while passes > 0:
        last = tl.where(z == -INF, -INF, scores)
        scores = rounded(_score(last, func), dtype)
        passes -= 1
    return scores, last


@triton.jit
def _score_some(z, excluded, func, passes, dtype):
    """As `_score_all`, where -inf does not say which classes are excluded."""
    scores = rounded(_score(z, func), dtype)
    while passes > 1:
        scores = rounded(_score(tl.where(excluded, -INF, scores), func), dtype)
        passes -= 1
    return scores


@triton.jit
def _score(z, func):
    """softmax (also for sparsemixer), sigmoid, or sqrtsoftplus."""
    s = z
    if (func == 1) | (func == 2):
        small = exp(-tl.abs(z), 0.0)
        if func == 1:
            s = tl.div_rn(tl.where(z >= 0, 1.0, small), 1.0 + small)
        else:
            s = tl.sqrt_rn(tl.where(z > 0, z, 0.0) + log1p(small))
            # there log(1 + e^z) is e^z, whose root float32 holds long after it holds e^z no more
            s = tl.where(z < -20.0, exp(-tl.abs(0.5 * z), 0.0), s)
        s = tl.where(z == z, s, z)
    else:
        w = exp_of_difference(z, _largest(z))
        s = tl.div_rn(w, tl.sum(w) + tl.zeros_like(w))
    return s


@triton.jit
def _entropy(z, func):
    """(nats, largest, sum of e^(z - largest)). Of scores other than softmax it is the entropy of
    the softmax of their logarithms, which do not underflow."""
    floor = -INF
    if (func == 1) | (func == 2):
        small = exp(-tl.abs(z), 0.0)
        if func == 1:
            z = tl.where(z < 0, z, 0.0) - log1p(small)
            floor = -745.1
        else:
            soft = tl.where(z > 0, z, 0.0) + log1p(small)
            z = 0.5 * tl.where(z < -12.0, z - 0.5 * small, tl.log(soft))
            floor = -372.5
    top = _largest(z)
    d = z - top
    w = tl.exp2(d * LOG2E)
    total = tl.sum(w)
    entropy = tl.log(total) - tl.sum(tl.where(w > 0, w * d, 0.0)) / total
    # below the floor float64 has no such scores, and the definition no entropy
    return tl.where(top < floor, float("nan"), entropy), top, total


@triton.jit
def _largest(x):
    """The maximum, or NaN: of integers a warp finds it in one instruction."""
    return unordered(tl.max(ordered(x)))


@triton.jit
def _limit_groups(biased, policy, groups, flip, E: tl.constexpr, E_PAD: tl.constexpr):
    """Mask all but the best `topk_group` groups; ties go to the lower group."""
    e = tl.arange(0, E_PAD)
    group = tl.where(e < E, e // (E // groups), -1)
    dtype = tl.load(policy + at.BIASED_DTYPE)
    two = tl.load(policy + at.GROUP_SCORE) == 1
    key = ordered(biased)
    nothing = ordered(tl.full([E_PAD], -INF, tl.float32))
    ranks = tl.full([E_PAD], LEAST, tl.int32)
    start = 0
    while start < groups:
        for next in tl.static_range(4):  # four at a time hide each other's latency
            g = start + next
            mine = tl.where(group == g, key, nothing)
            best = tl.max(mine)
            score = unordered(best)
            if two:
                first = tl.min(tl.where((group == g) & (mine == best), e, E_PAD))
                score += unordered(tl.max(tl.where(e == first, nothing, mine)))
                score = rounded(tl.where(score == score, score, INF), dtype)
            ranks = tl.where((e == g) & (e < groups), ordered(score), ranks)
        start += 4
    place = e ^ flip
    allowed = e < 0
    left = tl.load(policy + at.TOPK_GROUP).to(tl.int32)
    while left > 0:
        left -= 1
        chosen = tl.min(tl.where(ranks == tl.max(ranks), place, E_PAD))
        allowed = allowed | (group == (chosen ^ flip))
        ranks = tl.where(place == chosen, LEAST, ranks)
    fill = tl.where(tl.load(policy + at.GROUP_MASK_FILL) == 1, 0.0, -INF)
    return tl.where(biased == -INF, biased, tl.where(allowed, biased, fill))


@triton.jit
def _pick(values, K, flip, E_PAD: tl.constexpr, K_PAD: tl.constexpr):
    """(values and ids [K_PAD] of the first K, the K-th value, the next value and its id).

    Values descend; ties go to the lower id, or to the higher one where `flip` is E_PAD - 1. What is
    -inf is not chosen: where nothing is left, a value is -inf and an id anything.
    """
    e, slot = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    place = e ^ flip
    open_ = values > -INF
    key = ordered(values)
    low = tl.where(open_, values.to(tl.int32, bitcast=True) & LOW_BITS, 0)
    keys = tl.full([K_PAD], LEAST, tl.int32)
    ids = tl.full([K_PAD], 0, tl.int32)
    above, below = tl.full([], LEAST, tl.int32), tl.full([], LEAST, tl.int32)
    next_id, k = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    if tl.max(low) == 0:
        packed = tl.where(open_, (key & HIGH_BITS) | (LOW_BITS ^ place), LEAST)
        while k <= K:
            above = below
            below = tl.max(packed)
            keys = tl.where(slot == k, below, keys)
            packed = tl.where(packed == below, LEAST, packed)
            k += 1
        next_id = (LOW_BITS ^ (below & LOW_BITS)) ^ flip
        ids = (LOW_BITS ^ (keys & LOW_BITS)) ^ flip
        keys, above, below = _unpacked(keys), _unpacked(above), _unpacked(below)
    else:
        key = tl.where(open_, key, LEAST)
        while k <= K:
            above = below
            below = tl.max(key)
            chosen = tl.min(tl.where(key == below, place, E_PAD))
            key = tl.where(place == chosen, LEAST, key)
            next_id = chosen ^ flip
            keys = tl.where(slot == k, below, keys)
            ids = tl.where(slot == k, next_id, ids)
            k += 1
    return _value(keys), ids, _value(above), _value(below), next_id


@triton.jit
def _unpacked(key):
    """The ordered value in a packed key."""
    whole = tl.where(key < 0, key | LOW_BITS, key & HIGH_BITS)
    return tl.where(key == LEAST, key, whole)


@triton.jit
def _value(key):
    return tl.where(key == LEAST, -INF, unordered(key))


@triton.jit
def _sparsemixer(z, ids, policy, dtype, E_PAD: tl.constexpr, K_PAD: tl.constexpr):
    """Two softmaxes, each over the logits near its own maximum (arXiv 2409.12136, inference)."""
    e, slot = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    threshold = tl.load(policy + at.SPARSEMIXER_THRESHOLD)
    scores = tl.full([K_PAD], 0.0, tl.float32)
    left = z
    for k in tl.static_range(2):
        id = tl.sum(tl.where(slot == k, ids, 0))
        top = tl.sum(tl.where(e == id, z, 0.0))
        size = tl.abs(z)
        size = tl.where(size > top, size, top)
        distance = rounded(tl.div_rn(rounded(top - z, dtype), size), dtype)
        kept = tl.where(distance > threshold, -INF, left)
        total = tl.sum(exp_of_difference(kept, top))
        scores = tl.where(slot == k, rounded(tl.div_rn(1.0, total), dtype), scores)
        left = tl.where(e == id, -INF, left)
    return scores


@triton.jit
def _normalised(w, used, policy):
    """w [K_PAD] float64 over its sum or p-norm; what is unused is 0."""
    p = tl.load(policy + at.NORM_P).to(tl.float64)
    eps = tl.load(policy + at.NORM_EPS).to(tl.float64)
    mode = tl.load(policy + at.NORM_EPS_MODE)
    total = tl.sum(w)
    if p != 1:
        size = tl.abs(w)
        powers = tl.where(size > 0, tl.exp(p * tl.log(size)), size)
        total = tl.sum(powers)
        total = tl.where(total > 0, tl.exp(tl.log(total) / p), total)
    if mode == 1:
        w = w / tl.where(total < eps, eps, total)
    else:
        count = tl.sum(used.to(tl.int32)).to(tl.float64)
        uniform = (mode == 2) & (total == 0)
        w = tl.where(uniform, 1.0 / count, w / (total + eps))
    return tl.where(used, w, 0.0)
