"""The router on torch tensors, on any device, without waiting for the device.

Same semantics and rounding points as `reference.py`: scores and weights are computed in float64
(one row is a few hundred numbers) so that ids agree with the definition; float32 where a device has
no float64. `_route_softmax` is the short path of the decode step; `_route_any` is its slow twin.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from moescope.kernels.reference import check_spec
from moescope.kernels.spec import RouterPolicy, RouterSpec, Routing

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAN = float("nan")


def route_torch(
    logits: Tensor,
    spec: RouterSpec,
    *,
    correction_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    token_ids: Tensor | None = None,
    hash_table: Tensor | None = None,
    keep_logits: bool = False,
) -> Routing:
    """See `moescope.kernels.route`. Token ids out of range are an error of the device's own."""
    plain = _checked(spec)
    if logits.ndim != 2 or logits.shape[1] != spec.E:
        raise ValueError(f"logits: expected [T, {spec.E}], found {list(logits.shape)}")
    if plain:
        return _route_softmax(logits, spec, keep_logits)
    bias = _rows("correction_bias", correction_bias, logits, spec.policy.correction_bias != "none")
    scale = _rows("per_expert_scale", per_expert_scale, logits, spec.policy.per_expert_scale)
    return _route_any(logits, spec, bias, scale, token_ids, hash_table, keep_logits)


@lru_cache(maxsize=4096)
def _checked(spec: RouterSpec) -> bool:
    """Refuse what no kernel takes; then, whether the short path serves."""
    check_spec(spec)
    return is_plain(spec)


def is_plain(spec: RouterSpec) -> bool:
    """Whether the short path serves `spec`: one softmax, top-k either side of it."""
    p, w = spec.policy, spec.wiring
    return (
        p.scoring_func == "softmax"
        and p.score_passes == 1
        and p.router_logit_scale == 1.0
        and p.router_logit_softcapping == 0.0
        and p.correction_bias == "none"
        and (p.n_group == 1 or p.n_group == p.topk_group)
        and p.tie_break == "lower_id"
        and p.weights_from == "scores"
        and p.norm_p == 1.0
        and p.norm_eps_mode == "add"
        and not p.per_expert_scale
        and not w.hash_table
        and w.null_expert_kind != "skip"
    )


def _route_softmax(logits: Tensor, spec: RouterSpec, keep_logits: bool) -> Routing:
    """Routing of plain softmax policies in about fifteen small operations on a CPU, where it is
    cheap to ask whether all logits are finite; elsewhere, and for rows that are not, in thirty."""
    p, K, E = spec.policy, spec.K, spec.E
    raw = logits.float()
    z = _round(raw, p.logits_dtype) if logits.dtype != _DTYPES[p.logits_dtype] else raw
    finite = z.device.type == "cpu" and math.isfinite(z.sum().item())
    exact = torch.softmax(z, -1, dtype=_wide(z))
    after = p.score_order == "topk_then_score"
    values = z if after else _round(exact, p.score_dtype).float()
    if not (finite or after):
        values = values.masked_fill(z == -torch.inf, -torch.inf)
    ranked, order = torch.sort(values, dim=-1, descending=True, stable=True)
    ids, scores = order[:, :K], ranked[:, :K]
    if after:
        scores = _round(torch.softmax(scores, -1, dtype=_wide(z)), p.score_dtype).float()
    weights = scores
    if p.norm_topk_prob:
        weights = scores.to(exact.dtype)
        weights = weights / (weights.sum(-1, keepdim=True) + p.norm_eps)
    if spec.weight_scale != 1.0:
        weights = weights.to(exact.dtype) * spec.weight_scale
    weights = _round(weights, spec.wiring.combine_dtype)
    entropy = torch.special.entr(exact).sum(-1)
    if finite and K < E:
        valid, runner_up = None, order[:, K]
        margin = ranked[:, K - 1] - ranked[:, K]
    else:
        # a row with NaN or +inf has a NaN score everywhere; one with too few logits ends in -inf
        valid = (ranked[:, K - 1] > -torch.inf) & ~torch.isnan(exact[:, 0])
        margin, runner_up = _edge(ranked, order, K, E)
    return _routing(raw, valid, ids, scores, weights, entropy, margin, runner_up, keep_logits)


def _route_any(
    logits: Tensor,
    spec: RouterSpec,
    bias: Tensor | None,
    per_expert: Tensor | None,
    token_ids: Tensor | None,
    hash_table: Tensor | None,
    keep_logits: bool,
) -> Routing:
    """Routing under any policy, step by step as `reference.py` does it."""
    p, K, E = spec.policy, spec.K, spec.E
    raw = logits.float()
    z = _round(_round(raw.to(_wide(raw)), p.logits_dtype) * p.router_logit_scale, "float32")
    valid = (z < torch.inf).all(-1)  # false for NaN
    excluded = z == -torch.inf
    if cap := p.router_logit_softcapping:
        z = _round(cap * torch.tanh(z / cap), "float32").masked_fill(excluded, -torch.inf)
    exact, rounded = _score_all(z, excluded, p)
    entropy = torch.special.entr(exact / exact.sum(-1, keepdim=True)).sum(-1)

    by_logit = p.score_order == "topk_then_score" or p.scoring_func == "sparsemixer"
    biased = z if by_logit else rounded
    if bias is not None:
        bias = _round(bias.to(z.dtype), p.correction_bias_dtype)
        if p.correction_bias == "score":
            biased = _round(rounded + bias, _biased_dtype(p))
        else:
            biased = _round(z + bias, "float32")
            if not by_logit:
                biased = _score_all(biased, excluded, p)[1]
    biased = biased.masked_fill(excluded, -torch.inf)
    if spec.wiring.hash_table:
        ids = _hashed_ids(token_ids, hash_table, len(raw), K)
        valid &= excluded.sum(-1) <= E - K
        margin, runner_up = raw.new_full((len(raw),), _NAN), ids.new_full((len(raw),), -1)
    else:
        values = _limit_groups(biased, p)
        ranked, order = _sort(values, p.tie_break == "higher_id")
        ids = order[:, :K]
        valid &= (biased < torch.inf).all(-1) & (ranked[:, K - 1] > -torch.inf)
        margin, runner_up = _edge(ranked, order, K, E)

    scores = _selected_scores(z, rounded, ids, p)
    weights = _unnormalised(z, biased, scores, bias, ids, p)
    if p.norm_topk_prob:
        weights = _normalised(weights, p)
    if per_expert is not None:
        weights = weights * per_expert.to(z.dtype).expand(len(raw), E).gather(1, ids)
    weights = weights * spec.weight_scale
    if spec.wiring.null_expert_kind == "skip":
        weights = weights.masked_fill(ids >= spec.wiring.num_experts, 0.0)
    weights = _round(weights, spec.wiring.combine_dtype)
    return _routing(raw, valid, ids, scores, weights, entropy, margin, runner_up, keep_logits)


# --- steps, each the twin of the function of the same name in reference.py ------------------------


def _score_all(z: Tensor, excluded: Tensor, p: RouterPolicy) -> tuple[Tensor, Tensor]:
    func = "softmax" if p.scoring_func == "sparsemixer" else p.scoring_func
    exact = _score(z, func)
    rounded = _round(exact, p.score_dtype)
    for _ in range(p.score_passes - 1):
        exact = _score(rounded.masked_fill(excluded, -torch.inf), func)
        rounded = _round(exact, p.score_dtype)
    return exact, rounded


def _score(z: Tensor, func: str) -> Tensor:
    if func == "softmax":
        return torch.softmax(z, -1)
    if func == "sigmoid":
        return torch.sigmoid(z)
    return torch.sqrt(torch.clamp(z, min=0.0) + torch.log1p(torch.exp(-z.abs())))


def _limit_groups(biased: Tensor, p: RouterPolicy) -> Tensor:
    if p.n_group == 1 or p.topk_group == p.n_group:
        return biased
    grouped = biased.reshape(len(biased), p.n_group, -1)
    if p.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = _round(grouped.topk(2, -1).values.sum(-1), _biased_dtype(p))
    best = _sort(group_scores, p.tie_break == "higher_id")[1][:, : p.topk_group]
    masked = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    fill = -torch.inf if p.group_mask_fill == "-inf" else 0.0
    values = grouped.masked_fill(masked.unsqueeze(-1), fill).flatten(-2)
    return values.masked_fill(biased == -torch.inf, -torch.inf)


def _biased_dtype(p: RouterPolicy) -> str:
    if p.score_order == "topk_then_score":
        return "float32"
    if p.correction_bias != "score" or p.score_dtype == p.correction_bias_dtype:
        return p.score_dtype
    return "float32"


def _sort(values: Tensor, higher_id: bool) -> tuple[Tensor, Tensor]:
    """Values descending, then id ascending; topk leaves ties to chance, a stable sort does not."""
    if higher_id:
        ranked, order = torch.sort(values.flip(-1), dim=-1, descending=True, stable=True)
        return ranked, values.shape[-1] - 1 - order
    return torch.sort(values, dim=-1, descending=True, stable=True)


def _edge(ranked: Tensor, order: Tensor, K: int, E: int) -> tuple[Tensor, Tensor]:
    """The margin between ranks K and K+1, and who stands at K+1."""
    T = len(ranked)
    if K == E:
        return ranked.new_full((T,), _NAN), order.new_full((T,), -1)
    above, below = ranked[:, K - 1], ranked[:, K]
    absent = below == -torch.inf
    margin = (above.to(_wide(above)) - below).masked_fill(absent, _NAN)
    return margin, order[:, K].masked_fill(absent, -1)


def _hashed_ids(token_ids: Tensor | None, table: Tensor | None, T: int, K: int) -> Tensor:
    if token_ids is None or table is None:
        raise ValueError("hash_table: this router needs token_ids and hash_table")
    if token_ids.shape != (T,):
        raise ValueError(f"token_ids: expected [{T}], found {list(token_ids.shape)}")
    if table.ndim != 2 or table.shape[1] < K:
        raise ValueError(
            f"hash_table: expected [V, {K}] for num_experts_per_tok {K}, found {list(table.shape)}"
        )
    return table[token_ids, :K].long()


def _selected_scores(z: Tensor, rounded: Tensor, ids: Tensor, p: RouterPolicy) -> Tensor:
    if p.scoring_func == "sparsemixer":
        return _sparsemixer(z, ids, p)
    if p.score_order == "score_then_topk":
        return rounded.gather(1, ids)
    selected = z.gather(1, ids)
    return _score_all(selected, selected == -torch.inf, p)[1]


def _sparsemixer(z: Tensor, ids: Tensor, p: RouterPolicy) -> Tensor:
    dtype = p.score_dtype
    threshold = _round(z.new_tensor(2 * p.router_jitter_noise), dtype)
    scores, left = [], z
    for k in range(2):
        top = z.gather(1, ids[:, k : k + 1])
        distance = _round(_round(top - z, dtype) / torch.maximum(z.abs(), top), dtype)
        kept = left.masked_fill(distance > threshold, -torch.inf)
        scores.append(_round(1.0 / torch.exp(kept - top).sum(-1), dtype))
        left = left.scatter(1, ids[:, k : k + 1], -torch.inf)
    return torch.stack(scores, -1)


def _unnormalised(
    z: Tensor, biased: Tensor, scores: Tensor, bias: Tensor | None, ids: Tensor, p: RouterPolicy
) -> Tensor:
    """What `weights_from` names, for the selected [T, K]."""
    if p.weights_from == "scores":
        return scores
    if p.weights_from == "logits":
        return z.gather(1, ids)
    w = biased.gather(1, ids)
    if p.score_order == "topk_then_score":
        w = _score_all(w, w == -torch.inf, p)[1]
    if p.weights_from == "biased_minus_bias":
        assert bias is not None
        w = _round(w - bias.expand(len(z), z.shape[1]).gather(1, ids), _biased_dtype(p))
    return w


def _normalised(w: Tensor, p: RouterPolicy) -> Tensor:
    if p.norm_p == 1.0:
        total = w.sum(-1, keepdim=True)
    else:
        total = (w.abs() ** p.norm_p).sum(-1, keepdim=True) ** (1.0 / p.norm_p)
    if p.norm_eps_mode == "clamp":
        return w / torch.clamp(total, min=p.norm_eps)
    normalised = w / (total + p.norm_eps)
    if p.norm_eps_mode == "uniform":
        return torch.where(total == 0, 1.0 / w.shape[1], normalised)
    return normalised


def _routing(
    raw: Tensor,
    valid: Tensor | None,
    ids: Tensor,
    scores: Tensor,
    weights: Tensor,
    entropy: Tensor,
    margin: Tensor,
    runner_up: Tensor,
    keep_logits: bool,
) -> Routing:
    """Cast, sum, and blank the invalid rows (`valid` None: there are none)."""
    wide = _wide(raw)
    sums = [weights.sum(-1, dtype=wide), scores.sum(-1, dtype=wide), entropy, margin]
    sums = [a.float() for a in sums]
    ids, weights, scores = ids.int(), weights.float(), scores.float()
    runner_up = runner_up.int()
    if valid is not None and (raw.device.type != "cpu" or not bool(valid.all())):
        bad = ~valid
        row = bad.unsqueeze(-1)
        ids, weights = ids.masked_fill(row, -1), weights.masked_fill(row, 0.0)
        scores, runner_up = scores.masked_fill(row, _NAN), runner_up.masked_fill(bad, -1)
        sums = [a.masked_fill(bad, _NAN) for a in sums]
    score_sum, mass, entropy, margin = sums
    return Routing(
        ids,
        scores,
        weights,
        score_sum,
        mass,
        entropy,
        margin,
        runner_up,
        logits=raw if keep_logits else None,
    )


def _wide(x: Tensor) -> torch.dtype:
    """float64, or float32 where the device has none (Metal)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _round(x: Tensor, dtype: str) -> Tensor:
    """`x` rounded to `dtype`, in its own dtype. Through float32 first, as the reference does."""
    if dtype == "float32" and x.dtype == torch.float32:
        return x
    single = x.float()
    return (single if dtype == "float32" else single.to(_DTYPES[dtype])).to(x.dtype)


def _rows(name: str, value: Tensor | None, logits: Tensor, needed: bool) -> Tensor | None:
    if not needed:
        return None
    if value is None:
        raise ValueError(f"{name}: this router needs it")
    if value.shape not in {logits.shape[1:], logits.shape}:
        raise ValueError(
            f"{name}: expected [{logits.shape[1]}] or {list(logits.shape)}, "
            f"found {list(value.shape)}"
        )
    return value.reshape(-1, logits.shape[1])
