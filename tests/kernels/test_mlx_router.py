"""The router on MLX arrays against the reference: in plain operators, and in whatever `route_mlx`
runs here, which on a Mac is the Metal kernel. `make metal` runs this file there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.mlx_ops import (
    compare_twins,
    fields_of,
    gate_and_route_mlx,
    route_mlx,
    uses_metal,
)
from moescope.kernels.policy_rows import COLUMN, pack, pack_rows
from moescope.kernels.reference import gate_logits
from moescope.kernels.spec import Routing
from moescope.variants import CATALOGUE, applicable, apply, parse
from tests.kernels.mlx_cases import on_mlx, to_numpy
from tests.kernels.strategies import KINDS, Case, cases, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity
BIASED: dict[str, Any] = {"scoring_func": "sigmoid", "correction_bias": "score"}
FORMS: dict[str, dict[str, Any]] = {
    "plain, every step": {"use_metal": False},
    "plain, the steps needed": {"use_metal": False, "short": True},
    "what runs here": {},
}


def spec_of(E: int, K: int, **policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E, combine_dtype="float32"))


def rows_for(*specs: RouterSpec) -> mx.array:
    return mx.array(pack_rows(specs).astype(np.float32))


# --- the same as the reference --------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    expected = route(case.logits, case.spec, **case.inputs)
    for form, options in FORMS.items():
        if form == "what runs here" and not uses_metal(case.spec.E, case.spec.K):
            continue  # it is one of the other two
        found = on_mlx(case.logits, case.spec, **case.inputs, **options)
        wrong = compare(expected, found, case.spec, case.logits, correction_bias=case.bias)
        assert not wrong, (form, str(wrong[0]))


@pytest.mark.parametrize(("E", "K"), [(96, 8), (1000, 32), (2048, 16), (4096, 64), (8, 8)])
def test_agrees_in_real_sizes(E: int, K: int) -> None:
    """Also where the Metal kernel leaves it to the plain form."""
    spec = spec_of(E, K, norm_topk_prob=True)
    rng = np.random.default_rng(E)
    x = np.concatenate([rows_of(kind, 1, E, rng) for kind in KINDS])
    assert not compare(route(x, spec), on_mlx(x, spec), spec, x)


def test_leaving_steps_out_changes_no_bit() -> None:
    """The short form of a policy is the long one."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rows_of(kind, 2, 40, rng) for kind in KINDS])
    for policy in ({}, {"norm_topk_prob": True}, {"score_order": "topk_then_score"}):
        spec = spec_of(40, 6, **policy)
        short, long = (on_mlx(x, spec, use_metal=False, short=s) for s in (True, False))
        for field in fields(Routing):
            if field.name != "logits":
                np.testing.assert_array_equal(
                    getattr(short, field.name), getattr(long, field.name), field.name
                )


def test_ties_go_to_the_lower_id_and_show_as_margin_0() -> None:
    x = np.zeros((2, 300), np.float32)
    x[1, [7, 290, 3]] = 1.0
    found = on_mlx(x, spec_of(300, 4))
    assert found.expert_ids.tolist() == [[0, 1, 2, 3], [3, 7, 290, 0]]
    assert found.margin.tolist() == [0.0, 0.0] and found.runner_up.tolist() == [4, 1]
    higher = on_mlx(x, spec_of(300, 4, tie_break="higher_id"))
    assert higher.expert_ids.tolist() == [[299, 298, 297, 296], [290, 7, 3, 299]]


# --- rows are data --------------------------------------------------------------------------------

GROUPED = {**BIASED, "n_group": 4, "topk_group": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "grouped": {**GROUPED, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "sparse": {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_the_catalogue_beside_the_others(family: str) -> None:
    """P policies a token in one call; a policy with fewer picks leaves the rest of its places."""
    spec = RouterSpec(RouterPolicy(2, **FAMILIES[family]), RouterWiring(16)).resolved("bfloat16")
    names = [n for n in CATALOGUE if applicable(n, spec) and parse(n).on_logits]
    specs = [apply(name, spec, 0) for name in names]
    rng = np.random.default_rng(3)
    x = np.concatenate([rows_of("ties", 1, 16, rng), rows_of("negative", 1, 16, rng)])
    bias = np.round(rng.normal(size=16) * 4).astype(np.float32) / 4
    K_max = max(s.K for s in specs) + 1
    rows = mx.broadcast_to(rows_for(*specs)[None], (2, len(specs), 32))
    found = to_numpy(route_mlx(mx.array(x), rows, K_max, correction_bias=mx.array(bias)))
    assert found.expert_ids.shape == (2, len(specs), K_max)
    for place, (name, variant) in enumerate(zip(names, specs, strict=True)):
        K = variant.K
        here = {n: getattr(found, n)[:, place] for n in Routing.__slots__ if n != "logits"}
        cut = Routing(**{n: a[:, :K] if a.ndim == 2 else a for n, a in here.items()})
        expected = route(x, variant, correction_bias=bias)
        assert not compare(expected, cut, variant, x, correction_bias=bias), name
        assert (here["expert_ids"][:, K:] == -1).all() and not here["weights"][:, K:].any()


def test_rows_are_data_of_what_was_traced(tmp_path: Path) -> None:
    """Traced once and written to a file, then run under other policies."""
    x = rows_of("ties", 3, 24, np.random.default_rng(1))
    first = spec_of(24, 4)
    others = [first, first.with_policy(norm_topk_prob=True, num_experts_per_tok=2)]
    others.append(first.with_policy(norm_topk_prob=True, norm_eps=0.5))
    wanted = fields_of(pack_rows(others), 24)

    def step(logits: mx.array, rows: mx.array) -> list[mx.array]:
        found = route_mlx(logits, rows, 4, fields=wanted, use_metal=False)
        return [found.expert_ids, found.weights, found.score_sum]

    file = str(tmp_path / "step.mlxfn")
    mx.export_function(file, step, mx.array(x), rows_for(first))
    traced = mx.import_function(file)
    for spec in others:
        ids, weights, score_sum = traced(mx.array(x), rows_for(spec))
        expected = route(x, spec)
        np.testing.assert_array_equal(np.array(ids)[:, : spec.K], expected.expert_ids)
        np.testing.assert_allclose(np.array(weights)[:, : spec.K], expected.weights, rtol=1e-6)
        np.testing.assert_allclose(np.array(score_sum), expected.score_sum, rtol=1e-6)


def test_which_steps_rows_need() -> None:
    plain = spec_of(16, 2, norm_topk_prob=True, norm_eps=1e-20)
    other = plain.with_policy(scoring_func="sigmoid", routed_scaling_factor=2.5)
    assert fields_of(pack(plain), 16) == frozenset()
    assert fields_of(pack_rows([plain, other]), 16) == {"scoring_func", "weight_scale"}
    nulls = RouterWiring(12, 4, "skip", combine_dtype="bfloat16")
    skips = RouterSpec(plain.policy, nulls)
    assert fields_of(pack(skips), 16) == {"weightless_from", "combine_dtype"}


# --- rows that are not routed ---------------------------------------------------------------------


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_is_poisoned_alone(bad: float, short: bool) -> None:
    for at in (0, 7, 18):
        x = rows_of("normal", 4, 19, np.random.default_rng(0))
        x[2, at] = bad
        x[3, 2:] = -np.inf
        found = on_mlx(x, spec_of(19, 3), short=short, keep_logits=True)
        assert found.expert_ids[2:].tolist() == [[-1] * 3] * 2 and (found.expert_ids[:2] >= 0).all()
        assert not found.weights[2:].any() and np.isnan(found.scores[2:]).all()
        for name in ("score_sum", "mass", "entropy", "margin"):
            assert np.isnan(getattr(found, name)).tolist() == [False, False, True, True]
        assert found.runner_up[2:].tolist() == [-1, -1]
        np.testing.assert_array_equal(found.logits, x)


@pytest.mark.parametrize(
    ("column", "value", "places"),
    [
        ("num_experts_per_tok", 17, 8),
        ("num_experts_per_tok", 9, 8),  # more than there is room for
        ("num_experts_per_tok", 0, 0),
        ("n_group", 3, 4),
        ("topk_group", 2, 4),
        ("scoring_func", 3, 4),  # sparsemixer takes two
        ("score_passes", 0, 4),
        ("correction_bias", 1, 4),  # and no bias
        ("per_expert_scale", 1, 4),  # and no scale
        ("hash_table", 1, 4),  # and no ids
    ],
)
def test_a_policy_that_does_not_fit_makes_the_row_invalid(
    column: str, value: int, places: int
) -> None:
    rows = pack(spec_of(16, 4))[None].astype(np.float32)
    rows[0, COLUMN[column]] = value
    for use_metal in (None, False):
        found = to_numpy(route_mlx(mx.zeros((1, 16)), mx.array(rows), 8, use_metal=use_metal))
        assert (found.expert_ids == -1).all() and not found.weights.any()
        assert np.isnan(found.scores).tolist() == [[k < places for k in range(8)]]


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_hash_id_out_of_range_is_an_invalid_row(wrong: int) -> None:
    spec = spec_of(16, 4).with_wiring(hash_table=True)
    hashed = mx.array([[1, 2, wrong, 3], [1, 2, 0, 3]], dtype=mx.int32)
    found = route_mlx(mx.zeros((2, 16)), rows_for(spec), 4, hash_ids=hashed)
    assert found.expert_ids.tolist() == [[-1] * 4, [1, 2, 0, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": mx.zeros((8,))}, r"logits: expected \[T, E\]"),
        ({"rows": mx.zeros((2, 32))}, r"rows: expected \[3, 32\], found \[2, 32\]"),
        ({"rows": mx.zeros((3, 31))}, r"rows: expected \[3, 32\]"),
        ({"K_max": 0}, "K_max: expected at least 1"),
        ({"correction_bias": mx.zeros((7,))}, r"correction_bias: expected \[8\] or \[3, 8\]"),
        ({"hash_ids": mx.zeros((2, 4))}, r"hash_ids: expected \[3, 4\]"),
        ({"use_metal": True, "K_max": 33}, "33 picks: the Metal router takes 32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"logits": mx.zeros((3, 8)), "rows": mx.zeros((3, 32)), "K_max": 4}
    call = {**good, **change}
    with pytest.raises(ValueError, match=message):
        route_mlx(call.pop("logits"), call.pop("rows"), call.pop("K_max"), **call)


# --- the gate, and the twins ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16])
def test_gate_and_router_together(dtype: str, stored: mx.Dtype) -> None:
    E, H, K = 60, 200, 6
    wiring = RouterWiring(E, router_dtype=dtype, gate_bias=True)
    spec = RouterSpec(RouterPolicy(K, **BIASED), wiring).resolved("float32")
    rng = np.random.default_rng(4)
    hidden, gate, gate_bias, bias = (
        mx.array(rng.normal(size=shape).astype(np.float32)).astype(stored)
        for shape in ((1, H), (E, H), (E,), (E,))
    )
    exact = [np.array(a.astype(mx.float32)) for a in (hidden, gate, gate_bias, bias)]
    x = gate_logits(exact[0], exact[1], spec, gate_bias=exact[2])
    found = gate_and_route_mlx(
        *(hidden, gate, rows_for(spec), K),
        router_dtype=dtype,
        gate_bias=gate_bias,
        correction_bias=bias,
        keep_logits=True,
    )
    close = 2**-7 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(found.logits, x, rtol=close, atol=close)
    x = np.array(found.logits)
    expected = route(x, spec, correction_bias=exact[3])
    assert not compare(expected, to_numpy(found), spec, x, correction_bias=exact[3])


def test_how_far_the_twins_are_apart() -> None:
    spec = spec_of(64, 8, norm_topk_prob=True)
    x = np.concatenate([rows_of(kind, 2, 64, np.random.default_rng(0)) for kind in KINDS])
    found = compare_twins(mx.array(x), rows_for(spec), 8)
    assert found.rows == len(x) and found.other_ids == 0 and found.weight <= 1e-5
