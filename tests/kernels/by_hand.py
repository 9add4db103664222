"""A router written a second time, one row at a time in plain Python, from the prose of the spec.

Shares nothing with `moescope.kernels` but the field names, so that a mistake in one is not in the
other. Slow on purpose; for tests.
"""

from __future__ import annotations

import math
from typing import Any

INF, NAN = math.inf, math.nan
# precision in bits, smallest and largest exponent of a normal number
FORMATS = {"float32": (24, -126, 127), "bfloat16": (8, -126, 127), "float16": (11, -14, 15)}


def rounded(x: float, dtype: str) -> float:
    """Nearest number of the format, ties to even; low precision goes through float32."""
    if dtype != "float32":
        x = rounded(x, "float32")
    if not math.isfinite(x) or x == 0:
        return x
    bits, low, high = FORMATS[dtype]
    quantum_exponent = max(math.frexp(x)[1], low + 1) - bits
    result = math.ldexp(round(math.ldexp(x, -quantum_exponent)), quantum_exponent)
    return math.copysign(INF, x) if abs(result) >= 2.0 ** (high + 1) else result


def scored(zs: list[float], p: Any) -> tuple[list[float], list[float]]:
    """(scores, scores as rounded); a logit of -inf stays without score through every pass."""
    exact, rough = zs, zs
    for _ in range(p.score_passes):
        inputs = [-INF if z == -INF else r for z, r in zip(zs, rough, strict=True)]
        if p.scoring_func in ("softmax", "sparsemixer"):
            peak = max(inputs)
            powers = [math.exp(x - peak) if x != -INF else 0.0 for x in inputs]
            total = math.fsum(powers)
            exact = [x / total for x in powers]
        elif p.scoring_func == "sigmoid":
            exact = [1 / (1 + math.exp(-x)) if x > -700 else math.exp(x) for x in inputs]
        else:
            exact = [math.sqrt(x if x > 40 else math.log1p(math.exp(x))) for x in inputs]
        rough = [rounded(x, p.score_dtype) for x in exact]
    return exact, rough


def sum_dtype(p: Any) -> str:
    if p.score_order == "topk_then_score":
        return "float32"
    both = {p.score_dtype, p.correction_bias_dtype if p.correction_bias == "score" else ""} - {""}
    return both.pop() if len(both) == 1 else "float32"


def order_of(values: list[float], p: Any) -> list[int]:
    sign = -1 if p.tie_break == "higher_id" else 1
    return sorted(range(len(values)), key=lambda i: (-values[i], sign * i))


def group_masked(values: list[float], p: Any) -> list[float]:
    size = len(values) // p.n_group
    if p.n_group == 1 or p.topk_group == p.n_group:
        return values
    tops = []
    for g in range(p.n_group):
        best = sorted(values[g * size : (g + 1) * size], reverse=True)
        tops.append(best[0] if p.group_score == "max" else rounded(best[0] + best[1], sum_dtype(p)))
    winners = set(order_of(tops, p)[: p.topk_group])
    fill = 0.0 if p.group_mask_fill == "0" else -INF
    return [v if i // size in winners or v == -INF else fill for i, v in enumerate(values)]


def sparse_scores(zs: list[float], ids: list[int], p: Any) -> list[float]:
    limit = rounded(2 * p.router_jitter_noise, p.score_dtype)
    result, gone = [], set()
    for best in ids:
        peak, total = zs[best], 0.0
        for i, z in enumerate(zs):
            if i in gone or z == -INF:
                continue
            gap, size = rounded(peak - z, p.score_dtype), max(abs(z), peak)
            if size == 0 or rounded(gap / size, p.score_dtype) <= limit:  # 0 / 0 is kept
                total += math.exp(z - peak)
        result.append(rounded(1 / total, p.score_dtype))
        gone.add(best)
    return result


def normalised(ws: list[float], p: Any) -> list[float]:
    if p.norm_p == 1:
        total = math.fsum(ws)
    else:
        total = math.fsum(abs(w) ** p.norm_p for w in ws) ** (1 / p.norm_p)
    if p.norm_eps_mode == "uniform" and total == 0:
        return [1 / len(ws)] * len(ws)
    below = max(total, p.norm_eps) if p.norm_eps_mode == "clamp" else total + p.norm_eps

    def divided(w: float) -> float:
        if below:
            return w / below
        return NAN if w == 0 or math.isnan(w) else math.copysign(INF, w * below)

    return [divided(w) for w in ws]


def route_row(
    row: list[float],
    spec: Any,
    bias: list[float] | None = None,
    scales: list[float] | None = None,
    table_ids: list[int] | None = None,
) -> dict[str, Any] | None:
    """One row, or None where it is invalid."""
    p, w, K = spec.policy, spec.wiring, spec.policy.num_experts_per_tok
    zs = [rounded(rounded(x, p.logits_dtype) * p.router_logit_scale, "float32") for x in row]
    if any(math.isnan(z) or z == INF for z in zs) or sum(z != -INF for z in zs) < K:
        return None
    if cap := p.router_logit_softcapping:
        zs = [z if z == -INF else rounded(cap * math.tanh(z / cap), "float32") for z in zs]
    exact, rough = scored(zs, p)
    values = zs if p.score_order == "topk_then_score" or p.scoring_func == "sparsemixer" else rough
    if p.correction_bias != "none":
        assert bias is not None
        bias = [rounded(b, p.correction_bias_dtype) for b in bias]
    if p.correction_bias == "score":
        values = [rounded(s + b, sum_dtype(p)) for s, b in zip(rough, bias, strict=True)]
    if p.correction_bias == "logit":
        values = [rounded(z + b, "float32") for z, b in zip(zs, bias, strict=True)]
        if p.score_order == "score_then_topk":
            values = scored(values, p)[1]
    values = [-INF if z == -INF else v for z, v in zip(zs, values, strict=True)]
    runner, margin = -1, NAN
    if w.hash_table:
        ids = table_ids[:K]
    else:
        if any(math.isnan(v) or v == INF for v in values):
            return None
        admitted = group_masked(values, p)
        ranked = order_of(admitted, p)
        ids = ranked[:K]
        if admitted[ids[-1]] == -INF:
            return None
        if len(ranked) > K and admitted[ranked[K]] != -INF:
            runner = ranked[K]
            margin = admitted[ids[-1]] - admitted[runner]
    scores = _scores_of(ids, zs, rough, p)
    weights = _weights_of(ids, zs, values, scores, bias, p)
    if p.norm_topk_prob:
        weights = normalised(weights, p)
    if p.per_expert_scale:
        weights = [x * scales[i] for x, i in zip(weights, ids, strict=True)]
    if p.scale_site == "weights":
        weights = [x * p.routed_scaling_factor**p.scale_power for x in weights]
    if w.null_expert_kind == "skip":
        weights = [0.0 if i >= w.num_experts else x for x, i in zip(weights, ids, strict=True)]
    weights = [rounded(x, w.combine_dtype) for x in weights]
    total = math.fsum(exact)
    shares = [x / total for x in exact] if total else [NAN]
    entropy = -math.fsum(x * math.log(x) for x in shares if x > 0 or math.isnan(x))
    return {
        "expert_ids": ids,
        "scores": scores,
        "weights": weights,
        "score_sum": sum(weights),
        "mass": sum(scores),
        "entropy": entropy,
        "margin": margin,
        "runner_up": runner,
    }


def _scores_of(ids: list[int], zs: list[float], rough: list[float], p: Any) -> list[float]:
    if p.scoring_func == "sparsemixer":
        return sparse_scores(zs, ids, p)
    if p.score_order == "score_then_topk":
        return [rough[i] for i in ids]
    if all(zs[i] == -INF for i in ids):
        return [NAN if p.scoring_func == "softmax" else 0.0] * len(ids)
    return scored([zs[i] for i in ids], p)[1]


def _weights_of(
    ids: list[int],
    zs: list[float],
    values: list[float],
    scores: list[float],
    bias: list[float] | None,
    p: Any,
) -> list[float]:
    if p.weights_from == "scores":
        return scores
    if p.weights_from == "logits":
        return [zs[i] for i in ids]
    if p.weights_from == "biased_minus_bias":
        return [rounded(values[i] - bias[i], sum_dtype(p)) for i in ids]
    picked = [values[i] for i in ids]
    return scored(picked, p)[1] if p.score_order == "topk_then_score" else picked
