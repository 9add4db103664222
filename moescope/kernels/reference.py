"""The router, defined: numpy, float64 between the rounding points of the spec.

Every other kernel is tested against this one. Rounding points, in order: the gate's output to
`logits_dtype`; scaled and capped logits to float32; each scoring pass to `score_dtype`; the
correction bias to `correction_bias_dtype`; score + bias, and the group scores, to the wider of
those two; the weights, last of all, to `combine_dtype`. What is returned is float32.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.spec import RouterPolicy, RouterSpec, Routing

E_MAX, K_MAX = 4096, 64

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What selection is made from, per row: kept apart because the agreement rule reads it too."""

    logits: F64  # [T, E] as scored: rounded, scaled, capped
    scores: F64  # [T, E] unbiased scores of all classes, rounded; logits for topk_then_score
    biased: F64  # [T, E] selection values before groups; -inf where a class is excluded
    values: F64  # [T, E] selection values as ranked; -inf where not admissible
    group_scores: F64 | None  # [T, G] where groups limit the choice
    entropy: F64  # [T] nats
    valid: NDArray[np.bool_]  # [T]


def route_reference(
    logits: Any,
    spec: RouterSpec,
    *,
    correction_bias: Any = None,
    per_expert_scale: Any = None,
    token_ids: Any = None,
    hash_table: Any = None,
    keep_logits: bool = False,
) -> Routing:
    """See `moescope.kernels.route`."""
    check_spec(spec)
    raw = np.asarray(logits)
    if raw.ndim != 2 or raw.shape[1] != spec.E:
        raise ValueError(f"logits: expected [T, {spec.E}], found {list(raw.shape)}")
    p, K = spec.policy, spec.K
    bias = _rows("correction_bias", correction_bias, raw.shape, p.correction_bias != "none")
    per_expert = _rows("per_expert_scale", per_expert_scale, raw.shape, p.per_expert_scale)
    with np.errstate(all="ignore"):
        chosen = select(raw, spec, bias)
        if spec.wiring.hash_table:
            ids = _hashed_ids(token_ids, hash_table, len(raw), spec)
            margin, runner_up = np.full(len(raw), np.nan), np.full(len(raw), -1)
        else:
            ids, margin, runner_up = _top_k(chosen.values, K, p.tie_break == "higher_id")
        scores = _selected_scores(chosen, ids, p)
        weights = _combine_weights(chosen, ids, scores, bias, per_expert, spec)
        bad = ~chosen.valid
        ids[bad], weights[bad], runner_up[bad] = -1, 0.0, -1
        sums = [weights.sum(1), scores.sum(1), chosen.entropy, margin]
        for array in (*sums, scores):
            array[bad] = np.nan
        score_sum, mass, entropy, margin = (a.astype(np.float32) for a in sums)
        return Routing(
            expert_ids=ids.astype(np.int32),
            scores=scores.astype(np.float32),
            weights=weights.astype(np.float32),
            score_sum=score_sum,
            mass=mass,
            entropy=entropy,
            margin=margin,
            runner_up=runner_up.astype(np.int32),
            logits=raw.astype(np.float32) if keep_logits else None,
        )


def check_spec(spec: RouterSpec) -> None:
    """ValueError for what no kernel takes: too many experts, unresolved dtypes, joint softmax."""
    if spec.E > E_MAX:
        raise ValueError(f"num_experts {spec.E} is more than {E_MAX}")
    if spec.K > K_MAX:
        raise ValueError(f"num_experts_per_tok {spec.K} is more than {K_MAX}")
    p, w = spec.policy, spec.wiring
    for name, dtype in (
        ("logits_dtype", p.logits_dtype),
        ("score_dtype", p.score_dtype),
        ("correction_bias_dtype", p.correction_bias_dtype),
        ("combine_dtype", w.combine_dtype),
    ):
        if dtype == "model":
            raise ValueError(f"{name} is 'model': resolve the spec first (RouterSpec.resolved)")
    if w.shared_combination == "in_router_softmax":
        raise ValueError("shared_combination in_router_softmax is not supported by this version")


# --- from logits to selection values --------------------------------------------------------------


def select(raw: NDArray[Any], spec: RouterSpec, bias: F64 | None) -> Selection:
    """Score every class and say what may be chosen. `bias` is [1 or T, E], unrounded."""
    p = spec.policy
    z = round_to(raw, p.logits_dtype)
    z = round_to(z * p.router_logit_scale, "float32")
    finite = ~(np.isnan(z) | np.isposinf(z)).any(1)
    excluded = np.isneginf(z)
    if p.router_logit_softcapping:
        cap = p.router_logit_softcapping
        z = np.where(excluded, -np.inf, round_to(cap * np.tanh(z / cap), "float32"))
    exact, rounded = _score_all(z, excluded, p)
    total = exact.sum(1)
    share = exact / total[:, None]
    entropy = -np.where(share > 0, share * np.log(share), np.where(share == 0, 0, np.nan)).sum(1)

    by_logit = p.score_order == "topk_then_score" or p.scoring_func == "sparsemixer"
    biased = z if by_logit else rounded
    if p.correction_bias != "none":
        assert bias is not None
        b = round_to(bias, p.correction_bias_dtype)
        if p.correction_bias == "score":
            biased = round_to(rounded + b, biased_dtype(p))
        else:
            with_bias = round_to(z + b, "float32")
            biased = with_bias if by_logit else _score_all(with_bias, excluded, p)[1]
    biased = np.where(excluded, -np.inf, biased)
    values, group_scores = _limit_groups(biased, p)
    if spec.wiring.hash_table:
        valid = finite & (excluded.sum(1) <= spec.E - spec.K)
    else:
        usable = ~(np.isnan(biased) | np.isposinf(biased)).any(1)
        valid = finite & usable & (np.isneginf(values).sum(1) <= spec.E - spec.K)
    return Selection(z, rounded, biased, values, group_scores, entropy, valid)


def _score_all(z: F64, excluded: NDArray[np.bool_], p: RouterPolicy) -> tuple[F64, F64]:
    """Scores over all classes, before and after the last rounding. [T, E] each."""
    func = "softmax" if p.scoring_func == "sparsemixer" else p.scoring_func
    exact = _score(z, func)
    rounded = round_to(exact, p.score_dtype)
    for _ in range(p.score_passes - 1):
        exact = _score(np.where(excluded, -np.inf, rounded), func)
        rounded = round_to(exact, p.score_dtype)
    return exact, rounded


def _score(z: F64, func: str) -> F64:
    """The scoring function over the last axis, in float64, overflowing nowhere."""
    if func == "softmax":
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    small = np.exp(-np.abs(z))  # in (0, 1]
    if func == "sigmoid":
        return np.where(z >= 0, 1.0, small) / (1.0 + small)
    return np.sqrt(np.maximum(z, 0.0) + np.log1p(small))  # sqrtsoftplus


def _limit_groups(biased: F64, p: RouterPolicy) -> tuple[F64, F64 | None]:
    """Mask all but the best `topk_group` groups (ties to the lower group). DeepSeek-V2 and V3."""
    if p.n_group == 1 or p.topk_group == p.n_group:
        return biased, None
    T, E = biased.shape
    grouped = biased.reshape(T, p.n_group, E // p.n_group)
    if p.group_score == "max":
        group_scores = grouped.max(2)
    else:
        group_scores = round_to(
            np.partition(grouped, -2, axis=2)[:, :, -2:].sum(2), biased_dtype(p)
        )
    best = _descending(group_scores, p.tie_break == "higher_id")[:, : p.topk_group]
    admissible = np.zeros((T, p.n_group), bool)
    np.put_along_axis(admissible, best, True, axis=1)
    fill = -np.inf if p.group_mask_fill == "-inf" else 0.0
    masked = np.where(admissible[:, :, None], grouped, fill).reshape(T, E)
    return np.where(np.isneginf(biased), -np.inf, masked), group_scores


def biased_dtype(p: RouterPolicy) -> str:
    """The dtype of score + bias: the wider of the two; of float16 and bfloat16, float32."""
    if p.score_order == "topk_then_score":
        return "float32"
    if p.correction_bias != "score" or p.score_dtype == p.correction_bias_dtype:
        return p.score_dtype
    return "float32"


# --- from selection values to experts and weights -------------------------------------------------


def _descending(values: F64, higher_id: bool) -> NDArray[np.intp]:
    """Order by value descending, then by id ascending (descending under the tie fault)."""
    if higher_id:
        return values.shape[1] - 1 - np.argsort(-values[:, ::-1], axis=1, kind="stable")
    return np.argsort(-values, axis=1, kind="stable")


def _top_k(values: F64, K: int, higher_id: bool) -> tuple[NDArray[np.intp], F64, NDArray[np.intp]]:
    """Ids [T, K], the margin to rank K+1 [T], and who stands there [T]."""
    T, E = values.shape
    order = _descending(values, higher_id)
    if K == E:
        return order, np.full(T, np.nan), np.full(T, -1)
    next_id = order[:, K]
    edge = np.take_along_axis(values, order[:, K - 1 : K + 1], axis=1)
    absent = ~np.isfinite(edge[:, 1])
    margin = np.where(absent, np.nan, edge[:, 0] - edge[:, 1])
    return order[:, :K].copy(), margin, np.where(absent, -1, next_id)


def _hashed_ids(token_ids: Any, table: Any, T: int, spec: RouterSpec) -> NDArray[np.intp]:
    """Expert ids from the table [V, K or more], in the order of the table."""
    if token_ids is None or table is None:
        raise ValueError("hash_table: this router needs token_ids and hash_table")
    tokens, rows = np.asarray(token_ids), np.asarray(table)
    if tokens.shape != (T,):
        raise ValueError(f"token_ids: expected [{T}], found {list(tokens.shape)}")
    if rows.ndim != 2 or rows.shape[1] < spec.K:
        raise ValueError(
            f"hash_table: expected [V, {spec.K}] for num_experts_per_tok {spec.K}, "
            f"found {list(rows.shape)}"
        )
    if T and not 0 <= tokens.min() <= tokens.max() < len(rows):
        raise ValueError(f"token_ids: expected 0 to {len(rows) - 1}, found {tokens.max()}")
    ids = rows[tokens, : spec.K].astype(np.intp)
    if T and not 0 <= ids.min() <= ids.max() < spec.E:
        raise ValueError(f"hash_table: expected ids 0 to {spec.E - 1}, found {ids.max()}")
    return ids


def _selected_scores(chosen: Selection, ids: NDArray[np.intp], p: RouterPolicy) -> F64:
    """Unbiased scores of the selected [T, K], rounded to `score_dtype`."""
    if p.scoring_func == "sparsemixer":
        return _sparsemixer(chosen.logits, ids, p)
    if p.score_order == "score_then_topk":
        return np.take_along_axis(chosen.scores, ids, axis=1)
    z = np.take_along_axis(chosen.logits, ids, axis=1)
    return _score_all(z, np.isneginf(z), p)[1]


def _sparsemixer(z: F64, ids: NDArray[np.intp], p: RouterPolicy) -> F64:
    """Two softmaxes, each over the logits near its own maximum (arXiv 2409.12136, inference).

    A logit is kept where (max - z) / max(|z|, max) is at most twice the jitter; the second round
    leaves the first expert out, but its threshold is measured on all logits, as PhiMoE does.
    """
    dtype = p.score_dtype
    threshold = round_to(np.array(2 * p.router_jitter_noise), dtype)
    scores = np.empty(ids.shape)
    left = z.copy()
    for k in range(2):
        top = np.take_along_axis(z, ids[:, k : k + 1], axis=1)
        distance = round_to(round_to(top - z, dtype) / np.maximum(np.abs(z), top), dtype)
        kept = np.where(distance > threshold, -np.inf, left)
        e = np.exp(kept - top)
        scores[:, k] = round_to(1.0 / e.sum(1), dtype)
        np.put_along_axis(left, ids[:, k : k + 1], -np.inf, axis=1)
    return scores


def _combine_weights(
    chosen: Selection,
    ids: NDArray[np.intp],
    scores: F64,
    bias: F64 | None,
    per_expert: F64 | None,
    spec: RouterSpec,
) -> F64:
    """The factors multiplied with each expert [T, K], cast to `combine_dtype`."""
    p, w = spec.policy, scores
    if p.weights_from == "logits":
        w = np.take_along_axis(chosen.logits, ids, axis=1)
    elif p.weights_from != "scores":
        w = np.take_along_axis(chosen.biased, ids, axis=1)
        if p.score_order == "topk_then_score":
            w = _score_all(w, np.isneginf(w), p)[1]
        if p.weights_from == "biased_minus_bias":
            assert bias is not None
            b = round_to(bias, p.correction_bias_dtype)
            w = round_to(w - np.take_along_axis(_fit(b, len(ids)), ids, axis=1), biased_dtype(p))
    if p.norm_topk_prob:
        w = _normalised(w, p)
    if per_expert is not None:
        w = w * np.take_along_axis(_fit(per_expert, len(ids)), ids, axis=1)
    w = w * spec.weight_scale
    if spec.wiring.null_expert_kind == "skip":
        w = np.where(ids >= spec.wiring.num_experts, 0.0, w)
    return round_to(w, spec.wiring.combine_dtype)


def _normalised(w: F64, p: RouterPolicy) -> F64:
    if p.norm_p == 1.0:
        total = w.sum(1, keepdims=True)
    else:
        total = (np.abs(w) ** p.norm_p).sum(1, keepdims=True) ** (1.0 / p.norm_p)
    if p.norm_eps_mode == "clamp":
        return w / np.maximum(total, p.norm_eps)
    normalised = w / (total + p.norm_eps)
    if p.norm_eps_mode == "uniform":
        return np.where(total == 0, 1.0 / w.shape[1], normalised)
    return normalised


# --- the gate, rounding, inputs -------------------------------------------------------------------


def gate_logits(
    hidden: Any, gate_weight: Any, spec: RouterSpec, *, gate_bias: Any = None
) -> NDArray[np.float32]:
    """Router logits [T, E] from hidden states [T, H] and the gate's weight [E, H].

    Inputs and result are rounded to `router_dtype`; `gate_quant_bits` rounds each row of the weight
    to that many bits, symmetric about 0. The product itself is exact to float64.
    """
    dtype = spec.wiring.router_dtype
    if dtype == "model":
        raise ValueError("router_dtype is 'model': resolve the spec first (RouterSpec.resolved)")
    with np.errstate(all="ignore"):
        weight = round_to(np.asarray(gate_weight), dtype)
        if bits := spec.policy.gate_quant_bits:
            step = np.abs(weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
            weight = np.where(step > 0, np.rint(weight / step) * step, 0.0)
        logits = round_to(np.asarray(hidden), dtype) @ weight.T
        if gate_bias is not None:
            logits = logits + round_to(np.asarray(gate_bias), dtype)
        return round_to(logits, dtype).astype(np.float32)


def round_to(x: NDArray[Any], dtype: str) -> F64:
    """`x` rounded to `dtype` (to nearest, ties to even), as float64."""
    single = np.asarray(x, dtype=np.float32)  # through float32 first, as frameworks do
    if dtype == "float16":
        return single.astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return _to_bfloat16(single).astype(np.float64)
    return single.astype(np.float64)


def _to_bfloat16(single: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep the upper 16 bits of each float32, rounded half to even."""
    single = np.ascontiguousarray(single)
    bits = single.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(single), np.float32(np.nan), rounded)


def _rows(name: str, value: Any, shape: tuple[int, ...], needed: bool) -> F64 | None:
    """A learned vector as [1, E] or [T, E] float64; None where the policy does not use it."""
    if not needed:
        return None
    if value is None:
        raise ValueError(f"{name}: this router needs it")
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in {(shape[1],), tuple(shape)}:
        raise ValueError(
            f"{name}: expected [{shape[1]}] or {list(shape)}, found {list(array.shape)}"
        )
    return array.reshape(-1, shape[1])


def _fit(rows: F64, T: int) -> F64:
    return np.broadcast_to(rows, (T, rows.shape[1]))
