"""The Metal router's very text, compiled as C++, against the reference.

Lanes take turns here, forwards and backwards, with denormals as Metal has them; sanitisers and
planted faults are in test_metal_faults.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.metal.launch import covers, gate_router_launch
from moescope.kernels.policy_rows import COLUMN, pack_rows
from moescope.kernels.reference import gate_logits, round_to
from moescope.kernels.spec import Routing
from moescope.variants import CATALOGUE, applicable, apply, parse
from tests.kernels.metal_shim.build import text
from tests.kernels.metal_shim.device import USUAL, How, Library, as_bfloat16, routing
from tests.kernels.metal_shim.routers import (
    gate_variant,
    place_of,
    route_on,
    router_inputs,
    router_variants,
)
from tests.kernels.strategies import KINDS, Case, cases, rows_of
from tests.kernels.test_native_router import BASES, CORNERS, PAIRS, telling_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity
NARROW = ("bfloat16", "float16")
VARIANTS = [
    *router_variants(),
    *router_variants((2,), NARROW),
    *(gate_variant(h, g) for h, g in (("float32", "float32"), ("bfloat16", "bfloat16"))),
]
BACKWARDS, FLUSHED = How(backwards=True), How(flush=True)
SIZES = (1, 2, 3, 4, 6, 8, 12, 31, 32, 33, 60, 64, 96, 129, 256, 384, 1024)
NAMES = [name for name in Routing.__slots__ if name != "logits"]


@pytest.fixture(scope="module")
def metal(compiled: Callable[..., Path]) -> Library:
    return Library(compiled(text(VARIANTS)), VARIANTS)


@pytest.fixture(scope="module")
def contracted(compiled: Callable[..., Path]) -> Library:
    """Multiplications and additions of a statement contracted, as Metal may even in safe mode."""
    variants = router_variants((1, 2, 4))
    flags = ["-ffp-contract=fast", *(["-mfma"] if "fma" in _processor() else [])]
    return Library(compiled(text(variants), *flags), variants)


def _processor() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def on(
    library: Library, logits: np.ndarray, spec: RouterSpec, how: How = USUAL, **inputs: Any
) -> Routing:
    return route_on(library, library.variants, logits, spec, how, **inputs)


def spec_of(E: int, K: int, **policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E, combine_dtype="float32"))


def same_bits(one: Routing, other: Routing) -> bool:
    pairs = ((getattr(one, n), getattr(other, n)) for n in NAMES)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


# --- the same as the reference --------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(SIZES))
def test_agrees_with_the_reference(metal: Library, case: Case) -> None:
    """Whatever order lanes and rows run in, and where denormals are taken for 0."""
    expected = route(case.logits, case.spec, **case.inputs)
    found, backwards, flushed = (
        on(metal, case.logits, case.spec, how, **case.inputs) for how in (How(), BACKWARDS, FLUSHED)
    )
    assert same_bits(found, backwards)
    for routed in (found, flushed):
        wrong = compare(expected, routed, case.spec, case.logits, correction_bias=case.bias)
        assert not wrong, str(wrong[0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases((8, 12, 33, 60, 64, 96)))
def test_agrees_with_the_reference_when_contracted(contracted: Library, case: Case) -> None:
    expected = route(case.logits, case.spec, **case.inputs)
    found = on(contracted, case.logits, case.spec, FLUSHED, **case.inputs)
    assert not compare(expected, found, case.spec, case.logits, correction_bias=case.bias)


@pytest.mark.parametrize(("E", "K"), [(1, 1), (32, 32), (96, 8), (257, 32), (1000, 10), (1024, 32)])
def test_agrees_in_real_sizes(metal: Library, E: int, K: int) -> None:
    spec = spec_of(E, K, norm_topk_prob=True)
    rng = np.random.default_rng(E)
    x = np.concatenate([rows_of(kind, 1, E, rng) for kind in KINDS])
    assert not compare(route(x, spec), on(metal, x, spec), spec, x)


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_a_variant_is_what_the_reference_says(metal: Library, base: str, name: str) -> None:
    spec = apply(name, BASES[base], 0)
    x, bias = telling_rows(spec.E)
    x = x[::8]
    expected = route(x, spec, correction_bias=bias)
    for how in (How(), FLUSHED):
        found = on(metal, x, spec, how, **_bias_of(spec, bias))
        assert not compare(expected, found, spec, x, correction_bias=bias)


def _bias_of(spec: RouterSpec, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {} if spec.policy.correction_bias == "none" else {"correction_bias": bias}


@pytest.mark.parametrize("func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
def test_scores_are_the_reference_s_to_the_last_bit(
    metal: Library, func: str, spread: float
) -> None:
    """Down to denormals, also where the device takes them for 0; entropy to six digits."""
    x = (np.random.default_rng(7).normal(size=(12, 300)) * spread).astype(np.float32)
    spec = spec_of(300, 32, scoring_func=func)
    expected = route(x, spec)
    for how in (How(), FLUSHED):
        found = on(metal, x, spec, how)
        np.testing.assert_array_equal(found.expert_ids, expected.expert_ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_allclose(found.entropy, expected.entropy, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CORNERS)
def test_corner(metal: Library, name: str) -> None:
    spec, row, vector = CORNERS[name]
    x = np.array([row, row[::-1]], np.float32)
    bias = {} if vector is None else {"correction_bias": np.array(vector, np.float32)}
    expected, found = route(x, spec, **bias), on(metal, x, spec, **bias)
    for field in NAMES:
        have, want = getattr(found, field), getattr(expected, field)
        np.testing.assert_allclose(have, want, rtol=1e-6, err_msg=field)


@pytest.mark.parametrize("dtype", NARROW)
def test_logits_in_half_precision(metal: Library, dtype: str) -> None:
    x = round_to(rows_of("holes", 6, 50, np.random.default_rng(2)), dtype).astype(np.float32)
    x[1, 4], x[2] = np.nan, x[2] * 2.0**-20  # NaN, and denormals of float16
    x = round_to(x, dtype).astype(np.float32)
    spec = spec_of(50, 5, norm_topk_prob=True)
    launch, inputs = router_inputs(x, [spec], spec.K)
    inputs[0] = as_bfloat16(x) if dtype == "bfloat16" else x.astype(np.float16)
    found = routing(metal(place_of(VARIANTS, launch, dtype), launch, inputs))
    assert not compare(route(x, spec), found, spec, x)


# --- rows of policies -----------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "grouped": {**BASES["deepseek_v3"].to_json()["policy"], "n_group": 4, "topk_group": 2},
    "sparse": {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_the_catalogue_beside_the_others(metal: Library, family: str) -> None:
    """One launch routes each row under every variant that applies."""
    policy = {**FAMILIES[family], "num_experts_per_tok": 2}
    spec = RouterSpec(RouterPolicy(**policy), RouterWiring(16)).resolved("bfloat16")
    names = [n for n in CATALOGUE if applicable(n, spec) and parse(n).on_logits]
    specs = [apply(name, spec, 0) for name in names]
    rng = np.random.default_rng(3)
    x = np.concatenate([rows_of("ties", 1, 16, rng), rows_of("negative", 1, 16, rng)])
    bias = np.round(rng.normal(size=(2, 16)) * 4).astype(np.float32) / 4
    K_max, P = max(s.K for s in specs) + 1, len(specs)
    launch, inputs = router_inputs(x, specs, K_max, correction_bias=bias)
    found = metal(place_of(VARIANTS, launch), launch, inputs)
    for place, (name, variant) in enumerate(zip(names, specs, strict=True)):
        here = [a.reshape(2, P, *a.shape[1:])[:, place] for a in found]
        cut = routing([a[:, : variant.K] if a.ndim == 2 else a for a in here])
        expected = route(x, variant, correction_bias=bias)
        assert not compare(expected, cut, variant, x, correction_bias=bias), name
        assert (here[0][:, variant.K :] == -1).all() and not here[2][:, variant.K :].any()


def test_a_row_is_poisoned_alone(metal: Library) -> None:
    spec, x = spec_of(70, 3), rows_of("normal", 5, 70, np.random.default_rng(0))
    clean = on(metal, x, spec)
    for bad, at in ((np.nan, 0), (-np.nan, 69), (np.inf, 33)):
        y = x.copy()
        y[2, at] = bad
        y[4, 2:] = -np.inf
        found = on(metal, y, spec)
        assert found.expert_ids[[2, 4]].tolist() == [[-1] * 3] * 2
        assert not found.weights[[2, 4]].any() and np.isnan(found.scores[[2, 4]]).all()
        for name in NAMES:
            a, b = getattr(found, name)[[0, 1, 3]], getattr(clean, name)[[0, 1, 3]]
            np.testing.assert_array_equal(a, b, name)


@pytest.mark.parametrize(
    ("column", "value", "places"),
    [
        ("num_experts_per_tok", 17, 8),
        ("num_experts_per_tok", 9, 8),  # more than there is room for
        ("num_experts_per_tok", 0, 0),
        ("n_group", 3, 4),
        ("n_group", 0, 4),
        ("topk_group", 2, 4),
        ("scoring_func", 3, 4),  # sparsemixer takes two
        ("score_passes", 0, 4),
        ("correction_bias", 1, 4),  # and no bias
        ("per_expert_scale", 1, 4),  # and no scale
        ("hash_table", 1, 4),  # and no ids
    ],
)
def test_a_policy_that_does_not_fit_makes_the_row_invalid(
    metal: Library, column: str, value: int, places: int
) -> None:
    launch, inputs = router_inputs(np.zeros((1, 16), np.float32), [spec_of(16, 4)], 8)
    inputs[1][0, COLUMN[column]] = value
    found = routing(metal(place_of(VARIANTS, launch), launch, inputs))
    assert (found.expert_ids == -1).all() and not found.weights.any() and found.runner_up == -1
    assert np.isnan(found.scores).tolist() == [[k < places for k in range(8)]]


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_hash_id_out_of_range_is_an_invalid_row(metal: Library, wrong: int) -> None:
    spec = spec_of(16, 4).with_wiring(hash_table=True)
    hashed = np.array([[1, 2, wrong, 3], [1, 2, 0, 3]])
    launch, inputs = router_inputs(np.zeros((2, 16), np.float32), [spec], 4, hash_ids=hashed)
    found = routing(metal(place_of(VARIANTS, launch), launch, inputs))
    assert found.expert_ids.tolist() == [[-1] * 4, [1, 2, 0, 3]]


def test_what_the_kernels_cover() -> None:
    assert covers(1024, 32) == ""
    assert "1025 experts" in covers(1025, 8) and "33 picks" in covers(64, 33)


# --- the gate in the same launch ------------------------------------------------------------------


@pytest.mark.parametrize("H", [1, 40, 128, 300])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("router_dtype", [0, 1])
def test_gate_and_router_together(metal: Library, H: int, stored: str, router_dtype: int) -> None:
    """Two policies for the one token, three simdgroups for the experts; lanes both ways round."""
    E, K, dtype = 60, 6, ("float32", "bfloat16")[router_dtype]
    wiring = RouterWiring(E, router_dtype=dtype, gate_bias=True)
    policy = RouterPolicy(K, scoring_func="sigmoid", correction_bias="score")
    spec = RouterSpec(policy, wiring).resolved("float32")
    specs = [spec, spec.with_policy(num_experts_per_tok=2, norm_topk_prob=True)]
    rng = np.random.default_rng(H)
    shapes = ((H,), (E, H), (E,), (E,))
    arrays = [round_to(rng.normal(size=s), stored).astype(np.float32) for s in shapes]
    hidden, gate, gate_bias, bias = arrays
    launch = gate_router_launch(
        *(2, E, H, K),
        router_dtype=router_dtype,
        casts=dtype != stored,
        has_gate_bias=True,
        has_bias=True,
        simdgroups=3,
    )
    rows, sizes = pack_rows(specs).astype(np.float32), np.array(launch.sizes, np.int32)
    bits = as_bfloat16 if stored == "bfloat16" else np.asarray
    inputs = [bits(hidden), bits(gate), gate_bias, rows, bias, rows, sizes, sizes]
    place = place_of(VARIANTS, launch, stored)
    found, backwards = (metal(place, launch, inputs, how) for how in (How(), BACKWARDS))
    for a, b in zip(found, backwards, strict=True):
        np.testing.assert_array_equal(a, b)
    logits = found[-1][None]
    exact = gate_logits(hidden[None], gate, spec, gate_bias=gate_bias)
    close = 2.0**-7 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(logits, exact, rtol=close, atol=close)
    for place, variant in enumerate(specs):
        here = [a[place : place + 1] for a in found[:8]]
        cut = routing([a[:, : variant.K] if a.ndim == 2 else a for a in here])
        expected = route(logits, variant, correction_bias=bias)
        assert not compare(expected, cut, variant, logits, correction_bias=bias)
