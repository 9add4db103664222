"""What can be said about a router spec without a single logit: equality and allowed score sums.

`canonical` maps specs that agree for all logits, in exact arithmetic, onto one representative; it
may miss an equality and never invents one. Rounding fields are taken at their word: they are faults
that somebody shipped, so a spec that rounds differently is a different spec.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moescope.kernels.spec import RouterPolicy, RouterSpec

_NEGLIGIBLE = 1e-7  # relative, well inside the 1e-5 that kernels may differ by
_BELOW_ZERO = -1e-30  # as a low end it admits 0: a skipped class weighs exactly 0


def canonical(spec: RouterSpec) -> RouterSpec:
    """The representative of all specs equal to `spec`. Idempotent; keeps K and the wiring."""
    p = spec.policy
    for rule in (_unused, _groups, _scale, _order, _norm):
        p = rule(replace(spec, policy=p))
    return replace(spec, policy=p)


def _unused(spec: RouterSpec) -> RouterPolicy:
    """Fields that nothing reads take their default."""
    p, default = spec.policy, RouterPolicy(spec.K)
    if p.scoring_func != "sparsemixer":
        p = replace(p, router_jitter_noise=default.router_jitter_noise)
    if p.correction_bias == "none":
        p = replace(p, correction_bias_dtype=default.correction_bias_dtype)
    if not p.norm_topk_prob:
        p = replace(p, norm_p=1.0, norm_eps=0.0, norm_eps_mode="add")
    if spec.wiring.hash_table:  # ids come from the table: nothing is selected
        p = replace(p, n_group=1, topk_group=1, tie_break="lower_id")
        if not p.weights_from.startswith("biased"):
            p = replace(p, correction_bias="none", correction_bias_dtype="float32")
    return p


def _groups(spec: RouterSpec) -> RouterPolicy:
    """One group, or all admitted, is no limit; a fill of 0 is harmless below positive scores."""
    p, default = spec.policy, RouterPolicy(spec.K)
    if p.n_group == 1 or p.topk_group == p.n_group:
        return replace(
            p,
            n_group=1,
            topk_group=1,
            group_score=default.group_score,
            group_mask_fill=default.group_mask_fill,
        )
    positive = p.score_order == "score_then_topk" and p.correction_bias == "none"
    return replace(p, group_mask_fill="-inf") if positive else p


def _scale(spec: RouterSpec) -> RouterPolicy:
    p = spec.policy
    factor = p.routed_scaling_factor**p.scale_power
    if factor == 1.0:
        return replace(p, routed_scaling_factor=1.0, scale_power=1, scale_site="weights")
    return replace(p, routed_scaling_factor=factor, scale_power=1)


def _order(spec: RouterSpec) -> RouterPolicy:
    """Scores rise with their logits: scoring before top-k or after it is one router where nothing
    stands between them. Written as topk_then_score, where a softmax is normalised already."""
    p = spec.policy
    plain = (
        p.scoring_func != "sparsemixer"
        and p.score_passes == 1
        and p.score_dtype == "float32"
        and p.weights_from == "scores"
        and p.correction_bias != "score"
        and p.n_group == 1
    )
    if not plain or p.score_order == "topk_then_score":
        return p
    if p.scoring_func != "softmax":
        return replace(p, score_order="topk_then_score")
    if spec.K == spec.E or (p.norm_topk_prob and p.norm_p == 1.0 and _eps_is_lost(spec)):
        return replace(p, score_order="topk_then_score", norm_topk_prob=False)
    return p


def _norm(spec: RouterSpec) -> RouterPolicy:
    """Dividing by a sum that is 1 does nothing; without an eps, neither does its mode."""
    p = spec.policy
    if p.norm_topk_prob and p.norm_p == 1.0 and _is_distribution(p):
        harmless = p.norm_eps <= 1.0 if p.norm_eps_mode == "clamp" else p.norm_eps <= _NEGLIGIBLE
        if harmless:
            p = replace(p, norm_topk_prob=False)
    if not p.norm_topk_prob:
        return replace(p, norm_p=1.0, norm_eps=0.0, norm_eps_mode="add")
    if p.norm_eps == 0 and p.norm_eps_mode == "clamp" and p.weights_from == "scores":
        p = replace(p, norm_eps_mode="add")
    return p


def _is_distribution(p: RouterPolicy) -> bool:
    """Whether the unnormalised weights are a softmax over the selected."""
    return (
        p.scoring_func == "softmax"
        and p.score_order == "topk_then_score"
        and p.weights_from == "scores"
        and p.score_dtype == "float32"
    )


def _eps_is_lost(spec: RouterSpec) -> bool:
    """Whether `norm_eps` moves no weight. The K largest of E softmax scores sum to K / E at least;
    chosen by a table or by biased logits, they may sum to anything."""
    p = spec.policy
    if spec.wiring.hash_table or p.correction_bias != "none":
        return p.norm_eps == 0 and p.norm_eps_mode != "uniform"
    least = spec.K / spec.E
    return p.norm_eps <= (least if p.norm_eps_mode == "clamp" else least * _NEGLIGIBLE)


def allowed_score_sum(spec: RouterSpec) -> float | tuple[float, float] | None:
    """The score sum `spec` allows: a number where it normalises, (low, high) with low excluded
    where it does not, None where nothing can be said. An eps up to 1e-5 counts as none."""
    p, factor = spec.policy, spec.weight_scale
    skips = spec.wiring.null_expert_kind == "skip"
    low = _BELOW_ZERO if skips else 0.0
    positive = p.weights_from == "scores"
    if p.per_expert_scale or p.weights_from in ("logits", "biased_minus_bias"):
        return None
    if p.norm_topk_prob and (positive or (p.norm_p == 1.0 and not skips)):
        if p.norm_p != 1.0:
            ends = sorted((1.0, spec.K ** (1.0 - 1.0 / p.norm_p)))
            return (low if skips else ends[0] * factor * (1 - 1e-6), ends[1] * factor)
        return (low, factor) if skips or p.norm_eps > 1e-5 else factor
    if not positive:
        return None
    if p.scoring_func == "softmax":
        whole = p.score_order == "topk_then_score" or spec.K == spec.E
        return factor if whole and p.score_passes == 1 and not skips else (low, factor)
    if p.scoring_func == "sparsemixer":
        return (low, 2.0 * factor)
    return (low, spec.K * factor if p.scoring_func == "sigmoid" else math.inf)
