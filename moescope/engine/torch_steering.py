"""Executing steering (`moescope.variants.steering`) in the torch interpreter, lane by lane.

An intervention in every router (`Call.intervene`): rows of a steered lane are routed again from the
logits that the gate gave, with a bias on the choice, and their weights are then scaled or left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moescope.engine.lane import Steered
from moescope.kernels.spec import RouterSpec, Routing
from moescope.kernels.torch_ops import route_torch
from moescope.variants.steering import Steering

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS = ("expert_ids", "scores", "weights")  # [R, K]; the others are [R]
_NUMBERS = ("score_sum", "mass", "entropy", "margin", "runner_up")


def steer(interpreter: Any, lane: int, steered: Steered | None) -> None:
    """From the next call on, steer `lane` as `lane.steering_of` says; None: no longer."""
    steerer = _held(interpreter)
    if steered is None:
        if steerer is not None and lane in steerer.lanes:
            del steerer.lanes[lane]
            if not steerer.lanes and interpreter.intervene is steerer:
                interpreter.set_intervention(None)
        return
    if steerer is None:
        steerer = Steerer()
        interpreter.set_intervention(steerer)
    steerer.lanes[lane] = steered


def _held(interpreter: Any) -> Steerer | None:
    """The steerer in force, also behind an observer."""
    found = getattr(interpreter, "intervene", None)
    while found is not None and not isinstance(found, Steerer):
        found = getattr(found, "before", None)
    return found


class Steerer:
    """Steered lanes: per router what is steered, and the spec in force."""

    def __init__(self) -> None:
        self.lanes: dict[int, Steered] = {}

    def __call__(self, router: Any, x: Tensor, routing: Routing, call: Any) -> Routing:
        for lane, _, rows in call.spans():
            if lane not in self.lanes:
                continue
            steerings, specs = self.lanes[lane]
            steering, spec = steerings[router.index], specs[router.index]
            if steering is not None:
                part = steered(routing.logits[rows], spec, steering, router)
                routing = _placed(routing, part, rows)
        return routing


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
        weights = scaled.to(_DTYPES[spec.wiring.combine_dtype]).float()
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
        weights = weights.to(_DTYPES[spec.wiring.combine_dtype]).float()
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
