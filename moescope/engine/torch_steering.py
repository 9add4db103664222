"""Executing steering (`moescope.variants.steering`) on torch tensors; who is steered is in
`steered_lanes.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moescope.engine.torch_operators import DTYPES
from moescope.kernels.spec import RouterSpec, Routing
from moescope.kernels.torch_ops import route_torch
from moescope.variants.steering import Steering

_ROWS = ("expert_ids", "scores", "weights")  # [R, K]; the others are [R]
_NUMBERS = ("score_sum", "mass", "entropy", "margin", "runner_up")


def execute(
    routing: Routing, rows: slice, spec: RouterSpec, steering: Steering, router: Any
) -> Routing:
    """`routing` with `rows` of it steered; see `steered`."""
    return _placed(routing, steered(routing.logits[rows], spec, steering, router), rows)


def steered(logits: Tensor, spec: RouterSpec, steering: Steering, router: Any) -> Routing:
    """Rows of logits [R, E] routed under `spec` and `steering`. `router` holds the learned vectors
    `correction_bias` and `per_expert_scale`, or None."""
    own = router.correction_bias if spec.policy.correction_bias != "none" else None
    chosen, bias = _biased(logits, spec, steering, own)
    routing = route_torch(
        logits,
        chosen,
        correction_bias=bias,
        per_expert_scale=router.per_expert_scale if spec.policy.per_expert_scale else None,
        keep_logits=True,
    )
    weights, ids = routing.weights, routing.expert_ids
    if steering.min_p:
        weights, ids = _above(routing, steering.min_p, spec)
    if steering.scale:
        factors = torch.ones(spec.E, device=logits.device)
        for expert, factor in steering.scale:
            factors[expert] = factor
        scaled = weights * factors[ids.clamp(min=0).long()]
        weights = scaled.to(DTYPES[spec.wiring.combine_dtype]).float()
    valid = torch.isfinite(routing.score_sum)
    total = torch.where(valid, weights.sum(-1), routing.score_sum)
    return replace(routing, expert_ids=ids, weights=weights, score_sum=total)


def _biased(
    logits: Tensor, spec: RouterSpec, steering: Steering, own: Tensor | None
) -> tuple[RouterSpec, Tensor | None]:
    """The spec and the bias that make the choice: −inf for what is forbidden, more than anything
    else can reach for what is forced. Scores, and so weights, are made without it."""
    if not (steering.forbid or steering.force):
        return spec, own
    policy = spec.policy
    if own is None:
        kind = "score" if policy.score_order == "score_then_topk" else "logit"
        spec = spec.with_policy(correction_bias=kind, correction_bias_dtype="float32")
        bias = torch.zeros(spec.E, device=logits.device)
    else:
        bias = own.float().reshape(-1).clone()
    finite = torch.where(torch.isfinite(logits), logits.float().abs(), 0.0)
    reach = 2 * (2 + finite.max() + bias.abs().max())  # beyond every score and every logit
    if steering.force:
        bias[list(steering.force)] += reach
    if steering.forbid:
        bias[list(steering.forbid)] = -torch.inf
    return spec, bias


def _above(routing: Routing, share: float, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Weights and ids of the chosen whose score is at least `share` of the best; where weights are
    normalised, their sum stays."""
    used = routing.expert_ids >= 0
    scores = torch.where(used, routing.scores, -torch.inf)
    kept = used & (scores >= share * scores.amax(-1, keepdim=True))
    weights = torch.where(kept, routing.weights, 0.0)
    policy = spec.policy
    if policy.norm_topk_prob or policy.score_order == "topk_then_score":
        left = weights.sum(-1, keepdim=True)
        before = routing.weights.sum(-1, keepdim=True)
        weights = torch.where(left != 0, weights * (before / left), weights)
        weights = weights.to(DTYPES[spec.wiring.combine_dtype]).float()
    return weights, torch.where(kept, routing.expert_ids, -1)


def _placed(routing: Routing, part: Routing, rows: slice) -> Routing:
    """`routing` with `part` in its rows; slots beyond the part's K stay unused."""
    fields = {}
    for name in (*_ROWS, *_NUMBERS):
        whole = getattr(routing, name).clone()
        mine = getattr(part, name).to(whole.dtype)
        if name in _ROWS:
            whole[rows] = -1 if name == "expert_ids" else 0
            whole[rows, : mine.shape[1]] = mine
        else:
            whole[rows] = mine
        fields[name] = whole
    return replace(routing, **fields)
