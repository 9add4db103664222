"""Specs that are equal decide the same; specs that are not, somewhere decide otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.algebra import canonical
from moescope.kernels.spec import Routing
from tests.kernels.strategies import specs

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
AFTER = {"score_order": "topk_then_score"}
GROUPS = {"n_group": 4, "topk_group": 2}
BIAS = {"scoring_func": "sigmoid", "correction_bias": "score"}


def spec_of(policy: dict[str, Any], E: int = 32, **wiring: Any) -> RouterSpec:
    policy = {"num_experts_per_tok": 4, **policy}
    return RouterSpec(RouterPolicy(**policy), RouterWiring(E, combine_dtype="float32", **wiring))


EQUAL = [
    ({"norm_topk_prob": True}, AFTER),
    ({"norm_topk_prob": True, "norm_eps": 1e-20}, AFTER),
    ({"norm_topk_prob": True, "norm_eps": 1e-12, "norm_eps_mode": "clamp"}, AFTER),
    ({"norm_topk_prob": True}, {**AFTER, "norm_topk_prob": True}),
    (AFTER, {**AFTER, "norm_topk_prob": True, "norm_eps": 1e-20}),
    ({"scoring_func": "sigmoid"}, {"scoring_func": "sigmoid", **AFTER}),
    ({"num_experts_per_tok": 32}, {"num_experts_per_tok": 32, **AFTER}),
    ({"num_experts_per_tok": 32}, {"num_experts_per_tok": 32, "norm_topk_prob": True}),
    ({}, {"scale_power": 2}),
    ({}, {"scale_power": 0, "routed_scaling_factor": 3.0}),
    ({"routed_scaling_factor": 2.0, "scale_power": 2}, {"routed_scaling_factor": 4.0}),
    ({}, {"scale_site": "routed_output"}),
    ({}, {"group_score": "max", "group_mask_fill": "0"}),
    ({}, {"n_group": 4, "topk_group": 4, "group_mask_fill": "0"}),
    (GROUPS, {**GROUPS, "group_mask_fill": "0"}),  # softmax scores are positive
    ({}, {"router_jitter_noise": 0.3}),
    ({}, {"correction_bias_dtype": "bfloat16"}),
    ({}, {"norm_eps": 0.1, "norm_eps_mode": "clamp", "norm_p": 2.0}),
    (
        {**BIAS, "norm_topk_prob": True},
        {**BIAS, "norm_topk_prob": True, "norm_eps_mode": "clamp"},
    ),
]
DIFFERENT = [
    ({}, {"num_experts_per_tok": 5}),
    ({}, {"norm_topk_prob": True}),
    ({}, AFTER),
    ({}, {"scoring_func": "sigmoid"}),
    ({"scoring_func": "sigmoid", "norm_topk_prob": True}, AFTER),
    ({"norm_topk_prob": True, "norm_eps": 1e-3}, AFTER),
    ({"norm_topk_prob": True, "norm_p": 2.0}, AFTER),
    ({"norm_topk_prob": True, **GROUPS}, AFTER),
    ({"norm_topk_prob": True, **GROUPS}, {**AFTER, **GROUPS}),
    (
        {"norm_topk_prob": True, "norm_eps": 1e-3, "correction_bias": "logit"},
        {**AFTER, "correction_bias": "logit"},
    ),
    ({"norm_topk_prob": True, "score_passes": 2}, {**AFTER, "score_passes": 2}),
    ({"norm_topk_prob": True, "score_dtype": "bfloat16"}, {**AFTER, "score_dtype": "bfloat16"}),
    ({}, {"score_dtype": "bfloat16"}),
    ({}, {"logits_dtype": "bfloat16"}),
    ({}, {"tie_break": "higher_id"}),
    ({}, {"weights_from": "logits"}),
    ({}, {"routed_scaling_factor": 2.5}),
    ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 2.5, "scale_power": 2}),
    ({}, GROUPS),
    ({**BIAS, **GROUPS}, {**BIAS, **GROUPS, "group_mask_fill": "0"}),
    (BIAS, {"scoring_func": "sigmoid"}),
    (BIAS, {**BIAS, "weights_from": "biased_scores"}),
    (BIAS, {**BIAS, "correction_bias_dtype": "bfloat16"}),
    ({**BIAS, "norm_topk_prob": True}, {**BIAS, "norm_topk_prob": True, "norm_eps": 1e-3}),
]


def rows(E: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary rows, rows with ties, and a bias far below 0."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(400, E)).astype(np.float32)
    x[200:] = np.round(x[200:] * 4) / 4
    return x, (0.3 * rng.normal(size=E) - 3).astype(np.float32)


def decisions(spec: RouterSpec, x: np.ndarray, bias: np.ndarray) -> Routing:
    return route(x, spec, correction_bias=bias)


def agree(a: RouterSpec, b: RouterSpec, x: np.ndarray, bias: np.ndarray) -> bool:
    """Ids and weights agree; mass and margin may differ between equal specs."""
    if a.K != b.K:
        return False
    found = compare(decisions(a, x, bias), decisions(b, x, bias), a, x, correction_bias=bias)
    return not [d for d in found if "expert_ids" in d.field or d.field in ("weights", "score_sum")]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=str)
def test_equal_specs_decide_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = spec_of(one), spec_of(other)
    assert a.equal(b) and b.equal(a)
    assert agree(a, b, *rows())


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=str)
def test_specs_that_are_not_equal_decide_otherwise_somewhere(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    a, b = spec_of(one), spec_of(other)
    assert not a.equal(b) and not b.equal(a)
    assert not agree(a, b, *rows())


def test_a_factor_on_the_output_is_not_one_in_the_weights() -> None:
    inside = spec_of({"routed_scaling_factor": 2.5})
    outside = spec_of({"routed_scaling_factor": 2.5, "scale_site": "routed_output"})
    assert not inside.equal(outside)
    assert not outside.equal(spec_of({}))  # the weights agree, the routed output does not


def test_wiring_must_be_the_same() -> None:
    assert not spec_of({}).equal(spec_of({}, shared_experts=1))


@PROPERTY
@given(specs(sizes=(4, 8, 16)), st.integers(0, 2**32 - 1))
def test_a_spec_decides_as_its_canonical_form(spec: RouterSpec, seed: int) -> None:
    form = canonical(spec)
    assert canonical(form) == form and spec.equal(form)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, spec.E)) * 3
    bias = rng.normal(size=spec.E)
    table = np.stack([rng.permutation(spec.E)[: spec.K] for _ in range(8)])
    inputs = {
        "correction_bias": bias,
        "per_expert_scale": rng.uniform(0.5, 2, spec.E),
        "token_ids": np.arange(8),
        "hash_table": table,
    }
    a, b = route(x, spec, **inputs), route(x, form, **inputs)
    found = compare(a, b, spec, x, correction_bias=bias)
    wrong = [d for d in found if "expert_ids" in d.field or d.field in ("validity", "weights")]
    assert not wrong, [str(d) for d in wrong]


@PROPERTY
@given(specs(sizes=(8, 16)), st.data())
def test_one_changed_field_is_equal_only_if_nothing_changes(
    spec: RouterSpec, data: st.DataObject
) -> None:
    """Equality is never claimed for an edit that changes a decision."""
    edits = {
        "norm_topk_prob": not spec.policy.norm_topk_prob,
        "score_order": "topk_then_score",
        "scale_power": 1,
        "norm_eps": 0.0,
        "norm_eps_mode": "add",
        "group_mask_fill": "0",
        "tie_break": "lower_id",
        "score_passes": 1,
        "weights_from": "scores",
        "topk_group": spec.policy.n_group,
    }
    name = data.draw(st.sampled_from(sorted(edits)))
    try:
        other = spec.with_policy(**{name: edits[name]})
    except ValueError:
        return
    if not spec.equal(other):
        return
    rng = np.random.default_rng(12)
    x, bias = rng.normal(size=(16, spec.E)), rng.normal(size=spec.E)
    table = np.stack([rng.permutation(spec.E)[: spec.K] for _ in range(16)])
    inputs = {
        "correction_bias": bias,
        "per_expert_scale": rng.uniform(0.5, 2, spec.E),
        "token_ids": np.arange(16),
        "hash_table": table,
    }
    a, b = route(x, spec, **inputs), route(x, other, **inputs)
    found = compare(a, b, spec, x, correction_bias=bias)
    assert not [d for d in found if "expert_ids" in d.field or d.field == "weights"]
