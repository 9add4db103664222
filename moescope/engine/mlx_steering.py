"""Executing steering (`moescope.variants.steering`) on MLX arrays; who is steered is in
`steered_lanes.py`. Steered rows are routed in plain operators, on Metal too: they know −inf.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from moescope.engine.mlx_operators import DTYPES
from moescope.kernels.mlx_ops import route_mlx
from moescope.kernels.policy_rows import pack
from moescope.kernels.spec import RouterSpec, Routing
from moescope.variants.steering import Steering

_ROWS = ("expert_ids", "scores", "weights")  # [R, P, K]; the others are [R, P]


def execute(
    routing: Routing, rows: slice, spec: RouterSpec, steering: Steering, router: Any
) -> Routing:
    """`routing` [R, P, ...] with the policy in force of `rows` steered; see `steered`."""
    assert routing.logits is not None
    part = steered(routing.logits[rows], spec, steering, router)
    found: dict[str, mx.array] = {}
    for field in fields(Routing):
        if field.name == "logits":
            continue
        whole = mx.array(getattr(routing, field.name))  # a copy
        mine = getattr(part, field.name).astype(whole.dtype)
        if field.name in _ROWS:
            whole[rows, 0] = -1 if field.name == "expert_ids" else 0
            whole[rows, 0, : mine.shape[1]] = mine
        else:
            whole[rows, 0] = mine
        found[field.name] = whole
    return replace(routing, **found)


def steered(logits: mx.array, spec: RouterSpec, steering: Steering, router: Any) -> Routing:
    """Rows of logits [R, E] routed under `spec` and `steering`. `router` holds the learned vectors
    `correction_bias` and `per_expert_scale`, or None."""
    logits = logits[:, : spec.E]
    own = router.correction_bias if spec.policy.correction_bias != "none" else None
    chosen, bias = _biased(logits, spec, steering, own)
    routing = route_mlx(
        logits,
        mx.array(pack(chosen)[None].astype(np.float32)),
        spec.K,
        correction_bias=bias,
        per_expert_scale=router.per_expert_scale if spec.policy.per_expert_scale else None,
        use_metal=False,
    )
    weights, ids = routing.weights, routing.expert_ids
    if steering.min_p:
        weights, ids = _above(routing, steering.min_p, spec)
    if steering.scale:
        factors = np.ones(spec.E, np.float32)
        for expert, factor in steering.scale:
            factors[expert] = factor
        scaled = weights * mx.array(factors)[mx.maximum(ids, 0)]
        weights = scaled.astype(DTYPES[spec.wiring.combine_dtype]).astype(mx.float32)
    valid = mx.isfinite(routing.score_sum)
    total = mx.where(valid, weights.sum(-1), routing.score_sum)
    return replace(routing, expert_ids=ids, weights=weights, score_sum=total)


def _biased(
    logits: mx.array, spec: RouterSpec, steering: Steering, own: mx.array | None
) -> tuple[RouterSpec, mx.array | None]:
    """The spec and the bias that make the choice: −inf for what is forbidden, more than anything
    else can reach for what is forced. Scores, and so weights, are made without it."""
    if not (steering.forbid or steering.force):
        return spec, own
    policy = spec.policy
    if own is None:
        kind = "score" if policy.score_order == "score_then_topk" else "logit"
        spec = spec.with_policy(correction_bias=kind, correction_bias_dtype="float32")
        bias = mx.zeros(spec.E)
    else:
        bias = own.astype(mx.float32).reshape(-1)
    wide = logits.astype(mx.float32)
    finite = mx.where(mx.isfinite(wide), mx.abs(wide), 0.0)
    reach = 2 * (2 + finite.max() + mx.abs(bias).max())  # beyond every score and every logit
    forced, forbidden = np.zeros(spec.E, np.float32), np.zeros(spec.E, np.bool_)
    forced[list(steering.force)] = 1
    forbidden[list(steering.forbid)] = True
    bias = bias + mx.array(forced) * reach
    return spec, mx.where(mx.array(forbidden), -float("inf"), bias)


def _above(routing: Routing, share: float, spec: RouterSpec) -> tuple[mx.array, mx.array]:
    """Weights and ids of the chosen whose score is at least `share` of the best; where weights are
    normalised, their sum stays."""
    used = routing.expert_ids >= 0
    scores = mx.where(used, routing.scores, -float("inf"))
    kept = used & (scores >= share * scores.max(-1, keepdims=True))
    weights = mx.where(kept, routing.weights, 0.0)
    policy = spec.policy
    if policy.norm_topk_prob or policy.score_order == "topk_then_score":
        left = weights.sum(-1, keepdims=True)
        before = routing.weights.sum(-1, keepdims=True)
        safe = mx.where(left != 0, left, 1.0)
        weights = mx.where(left != 0, weights * (before / safe), weights)
        weights = weights.astype(DTYPES[spec.wiring.combine_dtype]).astype(mx.float32)
    return weights, mx.where(kept, routing.expert_ids, -1)
