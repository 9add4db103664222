"""The router in C against the reference: every policy, every instruction set this machine has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.kernels import (
    RouterPolicy,
    RouterSpec,
    RouterWiring,
    compare,
    native_ops,
    native_router,
    route,
)
from moescope.kernels.native_router import route_native, route_rows
from moescope.kernels.policy_rows import COLUMN, pack_rows
from moescope.kernels.reference import round_to
from moescope.kernels.spec import Routing
from moescope.variants import CATALOGUE, applicable, apply
from tests.kernels.native_build import router_library
from tests.kernels.strategies import Case, cases, rows_of, specs

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)
SIZES = (1, 2, 3, 5, 7, 8, 12, 15, 16, 17, 31, 33, 60, 64, 96, 129, 200, 256, 333, 384, 599)


@pytest.fixture(autouse=True, scope="module")
def from_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    built = router_library(tmp_path_factory.mktemp("router"))
    with pytest.MonkeyPatch.context() as patch:
        if built is not None:
            patch.setattr(native_ops, "library", lambda: built)
        yield


def spec_of(E: int, K: int, **policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E, combine_dtype="float32"))


def everywhere(logits: Any, spec: RouterSpec, **inputs: Any) -> list[Routing]:
    """Through every instruction set; there is always one."""
    count = len(native_router.instruction_sets())
    return [route_native(logits, spec, isa=isa, **inputs) for isa in range(count)]


# --- the same as the reference ------------------------------------------------------------------


@PROPERTY
@given(cases(SIZES))
def test_agrees_with_the_reference(case: Case) -> None:
    expected = route(case.logits, case.spec, **case.inputs)
    for found in everywhere(case.logits, case.spec, **case.inputs):
        assert not compare(expected, found, case.spec, case.logits, correction_bias=case.bias)


BIASED: dict[str, Any] = {"scoring_func": "sigmoid", "correction_bias": "score"}
V3 = {
    **BIASED,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "norm_eps": 1e-20,
    "routed_scaling_factor": 2.5,
}
BASES = {
    "olmoe": spec_of(64, 8),
    "top_1": spec_of(24, 1),
    "gpt_oss": spec_of(32, 4, score_order="topk_then_score", correction_bias="logit"),
    "deepseek_v2": spec_of(96, 6, n_group=8, topk_group=3, group_score="max", scale_power=1),
    "deepseek_v3": spec_of(64, 8, **V3),
    "minimax": spec_of(64, 8, **{**V3, "n_group": 1, "topk_group": 1}),
    "sqrtsoftplus": spec_of(48, 6, scoring_func="sqrtsoftplus", norm_topk_prob=True),
    "phimoe": spec_of(16, 2, scoring_func="sparsemixer", router_jitter_noise=0.01),
}
# before the logits: nothing of it is the router's
GATE = {name for name, variant in CATALOGUE.items() if "gate_quant_bits" in variant.policy}
# what a row of numbers can say; the rest of the catalogue rewires the decoder around a router
POLICIES = [
    name
    for name, variant in CATALOGUE.items()
    if not (variant.wiring or variant.decoder) and variant.seen != "none"
]
PAIRS = [
    (base, name) for base, spec in BASES.items() for name in POLICIES if applicable(name, spec)
]


def telling_rows(E: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows among which every fault shows: ties, sums that underflow, biases below 0."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rows_of(k, 40, E, rng) for k in ("normal", "ties", "negative", "wide")])
    x[:10] = 2 * x[:10] - 120
    bias = (0.5 * rng.normal(size=E) - rng.choice([1, 4], E)).astype(np.float32)
    bias[::2] = np.round(bias[::2] * 2) / 2
    return x, bias


def test_every_policy_of_the_catalogue_is_tried() -> None:
    assert {name for _, name in PAIRS} == set(POLICIES)


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_a_variant_is_what_the_reference_says_and_not_what_was_trained(
    base: str, name: str
) -> None:
    trained = BASES[base]
    spec = apply(name, trained, 0)
    x, bias = telling_rows(spec.E)
    expected = route(x, spec, correction_bias=bias)
    for found in everywhere(x, spec, correction_bias=bias):
        assert not compare(expected, found, spec, x, correction_bias=bias)
    if name not in GATE | {"trained"} and spec.K == trained.K:
        right = route(x, trained, correction_bias=bias)
        assert compare(right, found, trained, x, correction_bias=bias)


FUNCTIONS = st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    FUNCTIONS,
    st.integers(1, 600),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 30.0, 700.0]),
)
def test_scores_are_the_reference_s_to_the_last_bit_or_next_to_it(
    func: str, E: int, seed: int, spread: float
) -> None:
    spec = spec_of(E, min(E, 64), scoring_func=func)
    x = (np.random.default_rng(seed).normal(size=(2, E)) * spread).astype(np.float32)
    expected = route(x, spec)
    for found in everywhere(x, spec):
        np.testing.assert_array_equal(found.expert_ids, expected.expert_ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1.2e-7, atol=1e-45)
        np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-6, atol=1e-7)


def test_entropy_of_scores_that_are_barely_numbers() -> None:
    x = np.linspace(-735, -690, 40, dtype=np.float32)[None]
    spec = spec_of(40, 4, scoring_func="sigmoid")
    expected = route(x, spec)
    assert expected.mass[0] == 0 and expected.entropy[0] > 0.5
    for found in everywhere(x, spec):
        np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs((7, 33, 129)), st.integers(0, 2**32 - 1))
def test_equal_logits_have_equal_scores_wherever_they_stand(spec: RouterSpec, seed: int) -> None:
    """A vector's last, incomplete part is computed as its others are."""
    spec = spec.with_policy(correction_bias="none", weights_from="scores", per_expert_scale=False)
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(3, 1)), spec.E, axis=1).astype(np.float32)
    table = np.arange(spec.K)[None]
    for found in everywhere(x, spec, token_ids=np.zeros(3, int), hash_table=table):
        if spec.policy.scoring_func != "sparsemixer":
            assert (found.scores == found.scores[:, :1]).all()


def test_the_largest_router() -> None:
    spec = spec_of(4096, 64, n_group=4096, topk_group=1000, group_score="max")
    x = rows_of("ties", 3, 4096, np.random.default_rng(0))
    for edits in ({}, {"tie_break": "higher_id"}, {"n_group": 1, "topk_group": 1}):
        variant = spec.with_policy(**edits)
        expected = route(x, variant)
        for found in everywhere(x, variant):
            np.testing.assert_array_equal(found.expert_ids, expected.expert_ids)
            np.testing.assert_array_equal(found.runner_up, expected.runner_up)


def test_a_row_is_poisoned_alone() -> None:
    x = rows_of("normal", 4, 19, np.random.default_rng(0))
    clean = everywhere(x, spec_of(19, 3))
    for bad in (math.nan, -math.nan, math.inf):
        x[2, 18] = bad
        for before, after in zip(clean, everywhere(x, spec_of(19, 3)), strict=True):
            assert after.expert_ids[2].tolist() == [-1] * 3 and after.runner_up[2] == -1
            assert after.weights[2].tolist() == [0] * 3 and np.isnan(after.scores[2]).all()
            others = [0, 1, 3]
            np.testing.assert_array_equal(after.expert_ids[others], before.expert_ids[others])
            for name in ("score_sum", "mass", "entropy", "margin"):
                assert np.isnan(getattr(after, name)[2])
                assert np.isfinite(getattr(after, name)[others]).all()


# --- corners that random rows seldom find -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_as_numpy_rounds(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, 64)) * 2.0 ** rng.integers(-30, 20, (40, 64))).astype(np.float32)
    x[0, :6] = 65519.996, 65520, -65504, 2.0**-24, 2.0**-25, 6.1e-5
    spec = spec_of(64, 64, weights_from="logits").with_wiring(combine_dtype=dtype)
    with np.errstate(over="ignore"):
        rounded = round_to(x, dtype)
    for found in everywhere(x, spec):
        wanted = np.take_along_axis(rounded, found.expert_ids, 1)
        np.testing.assert_array_equal(found.weights, wanted)


CORNERS: dict[str, tuple[RouterSpec, list[float], list[float] | None]] = {
    "zeros of both signs tie": (
        spec_of(4, 2, score_order="topk_then_score"),
        [-0.0, 0.0, -1.0, 0.0],
        None,
    ),
    "an excluded expert stays so in a masked group": (
        spec_of(6, 3, n_group=2, topk_group=1, group_mask_fill="0", **BIASED),
        [1.0, 2.0, -math.inf, 0.0, 1.0, 2.0],
        [-5.0, -5.0, -5.0, -1.0, -1.0, -1.0],
    ),
    "a bias that bars too many": (spec_of(3, 2, **BIASED), [1.0, 2.0, 3.0], [-math.inf] * 3),
    "a masked group leaves too few": (
        spec_of(4, 2, n_group=2, topk_group=1, group_score="max"),
        [5.0, -math.inf, 4.0, 3.0],
        None,
    ),
    "a difference is rounded like the sum": (
        spec_of(
            4,
            4,
            weights_from="biased_minus_bias",
            score_dtype="bfloat16",
            correction_bias_dtype="bfloat16",
            **BIASED,
        ),
        [-3.0, -2.0, 0.3, 0.1],
        [0.0078, -0.0079, 0.101, -0.77],
    ),
    "nothing to normalise": (
        spec_of(4, 2, scoring_func="sigmoid", norm_topk_prob=True, norm_eps_mode="uniform"),
        [-1000.0] * 4,
        None,
    ),
    "0 / 0": (spec_of(4, 2, scoring_func="sigmoid", norm_topk_prob=True), [-1000.0] * 4, None),
    "sparsemixer at 0": (spec_of(4, 2, scoring_func="sparsemixer"), [0.0, -0.0, -1.0, 0.0], None),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corner(name: str) -> None:
    spec, row, vector = CORNERS[name]
    x = np.array([row, row[::-1]], np.float32)
    bias = None if vector is None else np.array(vector, np.float32)
    expected = route(x, spec, correction_bias=bias)
    for found in everywhere(x, spec, correction_bias=bias):
        for field in fields(Routing):
            if field.name != "logits":
                have, want = getattr(found, field.name), getattr(expected, field.name)
                np.testing.assert_allclose(have, want, rtol=1e-6, err_msg=field.name)


# --- rows of policies ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(specs((24,)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_a_row_goes_under_the_policies_it_names(found: list[RouterSpec], seed: int) -> None:
    rng = np.random.default_rng(seed)
    T, P, E, K_max = 5, 3, 24, 26
    x = rows_of("ties", T, E, rng)
    row_of = rng.integers(-1, len(found), (T, P)).astype(np.int32)
    bias, scale = (rng.uniform(0.5, 2, (n, E)).astype(np.float32) for n in (T, 1))
    hashed = np.stack([rng.permutation(E + 2) % E for _ in range(T)]).astype(np.int32)
    ids, scores, weights, scalars, runner_up = route_rows(
        x, pack_rows(found), row_of, K_max, bias, scale, hashed
    )
    for t, place in np.ndindex(T, P):
        results = ids[t, place], scores[t, place], weights[t, place]
        if row_of[t, place] < 0:
            assert (results[0] == -1).all() and runner_up[t, place] == -1
            assert not scores[t, place].any() and not weights[t, place].any()
            assert not scalars[t, place].any()
            continue
        spec = found[row_of[t, place]]
        alone = route_native(
            x[t : t + 1],
            spec,
            correction_bias=bias[t],
            per_expert_scale=scale[0],
            token_ids=np.array([t]),
            hash_table=hashed,
        )
        wanted = alone.expert_ids[0], alone.scores[0], alone.weights[0]
        for have, want, unused in zip(results, wanted, (-1, 0, 0), strict=True):
            np.testing.assert_array_equal(have[: spec.K], want)
            assert (have[spec.K :] == unused).all()
        sums = [getattr(alone, n)[0] for n in ("score_sum", "mass", "entropy", "margin")]
        np.testing.assert_array_equal(scalars[t, place], sums)
        assert runner_up[t, place] == alone.runner_up[0]


GOOD = spec_of(16, 4)


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
    rows, row_of = pack_rows([GOOD]), np.array([[0, 1]], np.int32)  # there is no row 1
    rows[0, COLUMN[column]] = value
    ids, scores, weights, *_ = route_rows(np.zeros((1, 16), np.float32), rows, row_of, 8)
    assert (ids == -1).all() and not weights.any()
    assert np.isnan(scores).tolist() == [[[k < places for k in range(8)], [False] * 8]]


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_hash_id_out_of_range_is_an_invalid_row(wrong: int) -> None:
    spec = GOOD.with_wiring(hash_table=True)
    hashed = np.array([[1, 2, wrong, 3], [1, 2, 0, 3]], np.int32)
    x, row_of = np.zeros((2, 16), np.float32), np.zeros((2, 1), np.int32)
    ids = route_rows(x, pack_rows([spec]), row_of, 4, hash_ids=hashed)[0]
    assert ids[:, 0].tolist() == [[-1] * 4, [1, 2, 0, 3]]


def test_more_experts_than_any_router_has_are_refused() -> None:
    row_of = np.zeros((1, 1), np.int32)
    ids = route_rows(np.zeros((1, 4097), np.float32), pack_rows([GOOD]), row_of, 4)[0]
    assert (ids == -1).all()


# --- numpy in, numpy out ------------------------------------------------------------------------


def test_results_are_arrays_of_the_promised_types() -> None:
    x = rows_of("normal", 3, 16, np.random.default_rng(0)).astype(np.float16)
    result = route_native(x, spec_of(16, 4), keep_logits=True)
    ids = {"expert_ids", "runner_up"}
    shapes = {"expert_ids": (3, 4), "scores": (3, 4), "weights": (3, 4), "logits": (3, 16)}
    for field in fields(Routing):
        array = getattr(result, field.name)
        assert array.dtype == (np.int32 if field.name in ids else np.float32), field.name
        assert array.shape == shapes.get(field.name, (3,)), field.name
    np.testing.assert_array_equal(result.logits, x.astype(np.float32))
    assert route_native(x, spec_of(16, 4)).logits is None
    assert route_native(x[:0], spec_of(16, 4)).expert_ids.shape == (0, 4)


def test_arrays_may_have_any_layout_and_rows_their_own_vectors() -> None:
    rng = np.random.default_rng(1)
    spec = spec_of(33, 5, per_expert_scale=True, **{**V3, "n_group": 3, "topk_group": 2})
    x, bias, scale = rng.normal(size=(3, 33, 12)).transpose(0, 2, 1)
    for rows in (slice(None), slice(1, None, 3)):
        inputs = {"correction_bias": bias[rows], "per_expert_scale": scale[rows]}
        expected = route(x[rows], spec, **inputs)
        for found in everywhere(x[rows], spec, **inputs):
            assert not compare(expected, found, spec, x[rows], correction_bias=bias[rows])


@pytest.mark.parametrize(
    ("logits", "inputs", "message"),
    [
        (np.zeros(8), {}, r"logits: expected \[T, 8\], found \[8\]"),
        (np.zeros((1, 9)), {}, r"logits: expected \[T, 8\], found \[1, 9\]"),
        (np.zeros((1, 8)), {}, "correction_bias: this router needs it"),
        (np.zeros((1, 8)), {"correction_bias": np.zeros(5)}, r"\[8\] or \[1, 8\], found \[5\]"),
        (np.zeros((1, 8)), {"correction_bias": np.zeros(8)}, "token_ids and hash_table"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    logits: np.ndarray, inputs: dict[str, Any], message: str
) -> None:
    spec = spec_of(8, 2, scoring_func="sigmoid", correction_bias="score")
    spec = spec.with_wiring(hash_table=True)
    with pytest.raises(ValueError, match=message):
        route_native(logits, spec, **inputs)


def test_unresolved_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="combine_dtype is 'model'"):
        route_native(np.zeros((1, 8)), RouterSpec(RouterPolicy(2), RouterWiring(8)))


@pytest.mark.parametrize("name", ["row_of", "policies", "correction_bias", "hash_ids"])
def test_arrays_that_c_would_read_beyond_are_refused(name: str) -> None:
    good: dict[str, Any] = {
        "logits": np.zeros((3, 16), np.float32),
        "policies": pack_rows([GOOD]),
        "row_of": np.zeros((3, 2), np.int32),
        "K_max": 4,
        "correction_bias": np.zeros((1, 16), np.float32),
        "hash_ids": np.zeros((3, 4), np.int32),
    }
    assert route_rows(**good)[0].shape == (3, 2, 4)
    short = good[name][:2] if name == "row_of" else good[name][:, :-1]
    with pytest.raises(ValueError, match=f"{name}: expected"):
        route_rows(**{**good, name: short})


def test_without_the_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_ops, "library", lambda: None)
    with pytest.raises(RuntimeError, match="backend native: its library was not built"):
        route_native(np.zeros((1, 16)), GOOD)
