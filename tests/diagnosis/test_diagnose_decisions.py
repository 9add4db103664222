"""How far logits are from a recorded decision, and how likely that makes it: pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.diagnosis.decisions import differences
from moescope.diagnosis.likelihood import SMALLEST, fit
from moescope.diagnosis.weighed import weights_at
from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, route

E, K = 16, 4
PLAIN = RouterSpec(RouterPolicy(K), RouterWiring(E)).resolved("float32")
SPECS = {
    "softmax": PLAIN,
    "renormalised": PLAIN.with_policy(norm_topk_prob=True),
    "after": PLAIN.with_policy(score_order="topk_then_score"),
    "sigmoid": PLAIN.with_policy(
        scoring_func="sigmoid", correction_bias="score", norm_topk_prob=True
    ),
    "ernie": PLAIN.with_policy(correction_bias="score", norm_topk_prob=True),
    "groups": PLAIN.with_policy(
        scoring_func="sigmoid",
        correction_bias="score",
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    "zeroed": PLAIN.with_policy(
        scoring_func="sigmoid",
        correction_bias="score",
        n_group=4,
        topk_group=2,
        group_mask_fill="0",
    ),
    "v2": PLAIN.with_policy(n_group=4, topk_group=2, group_score="max"),
    "v4": PLAIN.with_policy(scoring_func="sqrtsoftplus", correction_bias="score"),
    "coarse": PLAIN.with_policy(score_dtype="bfloat16", logits_dtype="bfloat16"),
    "sparse": RouterSpec(
        RouterPolicy(2, scoring_func="sparsemixer", router_jitter_noise=0.01), RouterWiring(E)
    ).resolved("float32"),
}
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def rows(seed: int, T: int = 40) -> tuple[Any, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    bias = (0.4 * rng.normal(size=E)).astype(np.float32)
    return (2 * rng.normal(size=(T, E))).astype(np.float32), {"correction_bias": bias}


def routed(x: Any, spec: RouterSpec, tensors: dict[str, Any]) -> Any:
    return route(x, spec, correction_bias=tensors["correction_bias"])


@pytest.mark.parametrize("name", SPECS)
@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_what_a_spec_decides_is_no_error_of_its_logits(name: str, seed: int) -> None:
    x, tensors = rows(seed)
    spec = SPECS[name]
    made = routed(x, spec, tensors)
    found = differences(x, spec, tensors, made.expert_ids, made.weights)
    assert not (found.gaps < 0).any()
    assert found.error().max() < 1e-5


@pytest.mark.parametrize("name", SPECS)
@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_weights_of_the_chosen_are_those_of_the_kernel(name: str, seed: int) -> None:
    x, tensors = rows(seed)
    made = routed(x, SPECS[name], tensors)
    found = weights_at(x, made.expert_ids, SPECS[name], tensors)
    assert np.allclose(found, made.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("coarse", "sparse")])
@PROPERTY
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-4, 1e-3, 1e-2]))
def test_an_error_of_logits_is_found_about_as_large_as_it_is(
    name: str, seed: int, size: float
) -> None:
    """Whoever decides from logits that are off by `size` is explained by an error of that order."""
    x, tensors = rows(seed)
    rng = np.random.default_rng(seed + 1)
    other = (x + size * rng.uniform(-1, 1, x.shape)).astype(np.float32)
    made = routed(other, SPECS[name], tensors)
    found = differences(x, SPECS[name], tensors, made.expert_ids)
    assert np.quantile(found.error(), 0.95) <= 3 * size
    weighed = differences(x, SPECS[name], tensors, made.expert_ids, made.weights)
    assert size / 100 < np.median(weighed.error()) <= 5 * size


def test_a_group_that_just_missed_is_a_near_tie_and_one_far_off_is_not() -> None:
    spec, (x, tensors) = SPECS["groups"], rows(3, 2000)
    made = routed(x, spec, tensors)
    other = (x + 1e-2 * np.random.default_rng(4).normal(size=x.shape)).astype(np.float32)
    near = routed(other, spec, tensors)
    changed = (np.sort(near.expert_ids) != np.sort(made.expert_ids)).any(1)
    assert changed.any()
    found = differences(x, spec, tensors, near.expert_ids)
    assert found.error()[changed].max() < 0.05
    ignored = routed(x, spec.with_policy(n_group=1, topk_group=1), tensors)
    far = differences(x, spec, tensors, ignored.expert_ids)
    assert (far.error() > 0.1).mean() > 0.3


def test_ids_in_another_order_are_wrong_in_order_only() -> None:
    x, tensors = rows(5)
    made = routed(x, PLAIN, tensors)
    turned = made.expert_ids[:, ::-1]
    assert differences(x, PLAIN, tensors, turned).error().max() > 0.1
    assert differences(x, PLAIN, tensors, turned, ordered=False).error().max() == 0


def test_another_number_of_experts_is_no_error_of_logits() -> None:
    x, tensors = rows(6)
    made = routed(x, PLAIN.with_policy(num_experts_per_tok=K - 1), tensors)
    ids = np.concatenate([made.expert_ids, np.full((len(x), 1), -1, np.int32)], 1)
    assert np.isinf(differences(x, PLAIN, tensors, ids).error()).all()
    fewer = PLAIN.with_policy(num_experts_per_tok=K - 1)
    assert differences(x, fewer, tensors, ids).error().max() == 0


def test_rows_that_were_not_recorded_count_for_nothing() -> None:
    x, tensors = rows(7)
    made = routed(x, PLAIN, tensors)
    ids = made.expert_ids.copy()
    ids[::2] = -1
    weights = np.where(ids >= 0, made.weights, np.nan)
    found = differences(x, PLAIN, tensors, ids, weights)
    assert np.isnan(found.gaps[::2]).all() and np.isnan(found.relative[::2]).all()
    fitted = fit([found])
    assert (fitted.nats[::2] == 0).all() and fitted.scale[0] <= SMALLEST


def test_a_table_of_ids_leaves_no_room() -> None:
    spec = PLAIN.with_wiring(hash_table=True)
    x, tensors = rows(8)
    table = np.random.default_rng(0).permuted(np.tile(np.arange(E), (50, 1)), axis=1)[:, :K]
    tokens = np.arange(len(x))
    tensors = {**tensors, "hash_table": table}
    found = differences(x, spec, tensors, table[tokens], token_ids=tokens)
    assert found.error().max() == 0
    other = differences(x, spec, tensors, (table[tokens] + 1) % E, token_ids=tokens)
    assert np.isinf(other.error()).all()


# --- likelihood -----------------------------------------------------------------------------------


def nats(spec: RouterSpec, x: Any, made: Any, tensors: Any, weighed: bool = True) -> Any:
    weights = made.weights if weighed else None
    return fit([differences(x, spec, tensors, made.expert_ids, weights)])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_router_that_decided_is_the_likeliest(name: str, noise: float) -> None:
    """Of all these routers, with and without an engine's noise."""
    x, tensors = rows(11, 120)
    rng = np.random.default_rng(12)
    seen = (x + noise * rng.normal(size=x.shape)).astype(np.float32)
    made = routed(seen, SPECS[name], tensors)
    found = {
        other: nats(spec, x, made, tensors).total
        for other, spec in SPECS.items()
        if spec.K == SPECS[name].K
    }
    best = max(found, key=lambda other: found[other])
    same = {"renormalised": "after", "after": "renormalised"}
    alike = {name, same.get(name, name)}
    if noise and name in ("softmax", "coarse"):
        alike |= {"softmax", "coarse"}  # what bfloat16 rounds is lost in noise
    assert best in alike
    assert found[name] >= max(found.values()) - (40 if noise else 1)


def test_noise_is_measured() -> None:
    x, tensors = rows(13, 200)
    for size in (1e-5, 1e-3, 0.03):
        seen = (x + size * np.random.default_rng(1).normal(size=x.shape)).astype(np.float32)
        scale = nats(PLAIN, x, routed(seen, PLAIN, tensors), tensors).scale[0]
        assert size / 4 < scale < 4 * size


def test_a_near_tie_costs_little_where_there_is_noise_and_much_where_there_is_none() -> None:
    """One flip of 0.01 logits: chance, if weights are off by as much; else no chance at all."""
    x, tensors = rows(14, 100)
    x[0, :2] = (5.0, 4.99)
    made = routed(x, PLAIN, tensors)
    ids = made.expert_ids.copy()
    assert ids[0, 0] == 0 and ids[0, 1] == 1
    ids[0, :2] = (1, 0)
    rng = np.random.default_rng(2)
    for size, least, most in ((0.0, 8.0, 14.0), (0.02, 0.0, 3.0)):
        off = made.weights * np.exp(size * rng.normal(size=ids.shape))
        turned = off.copy()
        turned[0, :2] = turned[0, [1, 0]]
        exact = fit([differences(x, PLAIN, tensors, made.expert_ids, off)])
        flipped = fit([differences(x, PLAIN, tensors, ids, turned)])
        cost = float((exact.nats - flipped.nats).sum())
        assert least <= cost <= most
