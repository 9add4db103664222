"""The reference router against a router written a second time, and against what is known of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.reference import gate_logits, round_to
from moescope.kernels.spec import Routing
from tests.kernels import by_hand
from tests.kernels.strategies import Case, cases, rows_of

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)


def spec_of(E: int, K: int, **policy: object) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E, combine_dtype="float32"))


def routed(logits: np.ndarray, spec: RouterSpec, backend: str, **inputs: np.ndarray) -> Routing:
    """Through either kernel, numpy in."""
    if backend == "torch":
        import torch

        inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return route(torch.from_numpy(logits), spec, backend=backend, **inputs)
    return route(logits, spec, **inputs)


def routed_by_hand(case: Case) -> Routing:
    """All rows of a case through the second router, as a Routing."""
    K = case.spec.K
    blank = {
        "expert_ids": [-1] * K,
        "weights": [0.0] * K,
        "scores": [math.nan] * K,
        "runner_up": -1,
    }
    rows = []
    for t, row in enumerate(case.logits.tolist()):
        table_ids = case.table[case.tokens[t]].tolist() if case.table is not None else None
        bias = None if case.bias is None else case.bias.tolist()
        scales = None if case.scales is None else case.scales.tolist()
        rows.append(by_hand.route_row(row, case.spec, bias, scales, table_ids) or blank)
    names = [n for n in Routing.__slots__ if n != "logits"]
    ids = ("expert_ids", "runner_up")
    with np.errstate(over="ignore"):
        columns = {
            n: np.array([r.get(n, math.nan) for r in rows]).astype(
                np.int32 if n in ids else np.float32
            )
            for n in names
        }
    return Routing(**columns)


@PROPERTY
@given(cases())
def test_equals_the_router_written_a_second_time(case: Case) -> None:
    result = route(case.logits, case.spec, **case.inputs)
    by_hand_result = routed_by_hand(case)
    assert not compare(by_hand_result, result, case.spec, case.logits, correction_bias=case.bias)


@PROPERTY
@given(cases(sizes=(4, 8, 16, 60)))
def test_results_have_the_promised_shapes_and_types(case: Case) -> None:
    result = route(case.logits, case.spec, keep_logits=True, **case.inputs)
    T, K = len(case.logits), case.spec.K
    for name in ("expert_ids", "scores", "weights"):
        assert getattr(result, name).shape == (T, K)
    for name in ("score_sum", "mass", "entropy", "margin", "runner_up"):
        assert getattr(result, name).shape == (T,)
    assert result.expert_ids.dtype == result.runner_up.dtype == np.int32
    assert result.weights.dtype == result.score_sum.dtype == result.margin.dtype == np.float32
    again = route(result.logits, case.spec, **case.inputs)
    np.testing.assert_array_equal(again.expert_ids, result.expert_ids)
    np.testing.assert_array_equal(again.weights, result.weights)


# --- exact statements -----------------------------------------------------------------------------


def test_exact_ties_go_to_the_lower_id_and_show_as_margin_0() -> None:
    result = route(np.zeros((2, 8), np.float32), spec_of(8, 3))
    assert result.expert_ids.tolist() == [[0, 1, 2]] * 2
    assert result.runner_up.tolist() == [3, 3]
    assert result.margin.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_invalid_and_its_neighbours_are_not(bad: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    x[1, 5] = bad
    result = route(x, spec_of(8, 2, norm_topk_prob=True))
    assert result.expert_ids[1].tolist() == [-1, -1]
    assert result.weights[1].tolist() == [0, 0]
    assert result.runner_up[1] == -1
    for name in ("score_sum", "mass", "entropy", "margin"):
        assert np.isnan(getattr(result, name)[1])
    np.testing.assert_allclose(result.score_sum[[0, 2]], 1, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("site", ["score", "logit"])
def test_a_correction_bias_that_is_not_a_number_invalidates_every_row(
    backend: str, site: str
) -> None:
    spec = spec_of(8, 2, scoring_func="sigmoid", correction_bias=site)
    x, bias = np.zeros((3, 8), np.float32), np.zeros(8, np.float32)
    bias[3] = np.nan
    result = routed(x, spec, backend, correction_bias=bias)
    assert np.asarray(result.expert_ids).tolist() == [[-1, -1]] * 3
    assert np.isnan(np.asarray(result.score_sum)).all()


def test_minus_infinity_excludes_an_expert_and_too_many_make_the_row_invalid() -> None:
    x = np.full((2, 6), -np.inf, np.float32)
    x[0, [1, 4]] = -300.0, -500.0  # the second underflows to score 0 and is chosen all the same
    x[1, 1] = 3.0
    result = route(x, spec_of(6, 2))
    assert result.expert_ids.tolist() == [[1, 4], [-1, -1]]
    assert result.runner_up.tolist() == [-1, -1] and np.isnan(result.margin).all()


def test_without_a_rank_beyond_k_there_is_no_runner_up() -> None:
    result = route(rows_of("normal", 3, 4, np.random.default_rng(0)), spec_of(4, 4))
    assert result.runner_up.tolist() == [-1] * 3 and np.isnan(result.margin).all()
    np.testing.assert_allclose(result.score_sum, 1, atol=1e-6)


def test_a_masked_group_offers_no_runner_up_unless_it_is_filled_with_0() -> None:
    x = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    edits = {"n_group": 2, "topk_group": 1, "group_score": "max"}
    assert route(x, spec_of(4, 2, **edits)).runner_up.tolist() == [-1]
    filled = route(x, spec_of(4, 2, **edits, group_mask_fill="0"))
    assert filled.runner_up.tolist() == [2]


def test_hash_routers_take_ids_from_the_table_and_weights_from_the_scores() -> None:
    spec = RouterSpec(
        RouterPolicy(2, scoring_func="sigmoid", norm_topk_prob=True),
        RouterWiring(4, hash_table=True, combine_dtype="float32"),
    )
    x = np.array([[0.0, 9.0, 0.0, 9.0]], np.float32)
    table = np.array([[0, 1], [2, 0]])
    result = route(x, spec, token_ids=np.array([1]), hash_table=table)
    assert result.expert_ids.tolist() == [[2, 0]]
    assert result.weights.tolist() == [[0.5, 0.5]]
    assert result.runner_up.tolist() == [-1] and np.isnan(result.margin[0])
    with pytest.raises(ValueError, match=r"token_ids: expected 0 to 1, found 2"):
        route(x, spec, token_ids=np.array([2]), hash_table=table)
    with pytest.raises(ValueError, match="hash_table"):
        route(x, spec)


def test_rows_of_several_routers_go_in_one_call() -> None:
    rng = np.random.default_rng(0)
    x, biases = rng.normal(size=(5, 16)), rng.normal(size=(5, 16))
    spec = spec_of(16, 4, scoring_func="sigmoid", correction_bias="score")
    together = route(x, spec, correction_bias=biases)
    for t in range(5):
        alone = route(x[t : t + 1], spec, correction_bias=biases[t])
        assert alone.expert_ids[0].tolist() == together.expert_ids[t].tolist()


def test_softmax_of_huge_and_sigmoid_of_very_negative_logits_stay_finite() -> None:
    huge = np.array([[3e38, -3e38, 0, 1]], np.float32)
    assert route(huge, spec_of(4, 1)).weights.tolist() == [[1.0]]
    low = np.full((1, 4), -80.0, np.float32)
    result = route(low, spec_of(4, 2, scoring_func="sqrtsoftplus", norm_topk_prob=True))
    np.testing.assert_allclose(result.weights, 0.5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("mode", "eps", "expected"),
    [("add", 0.0, math.nan), ("add", 1e-20, 0.0), ("clamp", 1e-12, 0.0), ("uniform", 0.0, 0.5)],
)
def test_what_is_left_when_every_score_underflows(
    mode: str, eps: float, expected: float, backend: str
) -> None:
    spec = spec_of(
        4, 2, scoring_func="sigmoid", norm_topk_prob=True, norm_eps=eps, norm_eps_mode=mode
    )
    result = routed(np.full((1, 4), -1000.0, np.float32), spec, backend)
    np.testing.assert_array_equal(np.asarray(result.weights), [[expected, expected]])


# --- metamorphic ----------------------------------------------------------------------------------

FLAVOURS = [
    spec_of(32, 4),
    spec_of(32, 4, norm_topk_prob=True, routed_scaling_factor=2.5),
    spec_of(32, 4, score_order="topk_then_score"),
    spec_of(32, 4, scoring_func="sigmoid", correction_bias="score", norm_topk_prob=True),
    spec_of(32, 2, scoring_func="sparsemixer", router_jitter_noise=0.01),
]


@pytest.mark.parametrize("spec", FLAVOURS, ids=lambda s: s.line())
def test_permuting_experts_permutes_ids(spec: RouterSpec) -> None:
    rng = np.random.default_rng(1)
    x, bias, shuffle = rng.normal(size=(50, 32)), rng.normal(size=32), rng.permutation(32)
    plain = route(x, spec, correction_bias=bias)
    moved = route(x[:, shuffle], spec, correction_bias=bias[shuffle])
    np.testing.assert_array_equal(shuffle[moved.expert_ids], plain.expert_ids)
    np.testing.assert_allclose(moved.weights, plain.weights, atol=1e-6)


@pytest.mark.parametrize("spec", FLAVOURS[:3], ids=lambda s: s.line())
def test_softmax_does_not_see_a_shift_of_all_logits(spec: RouterSpec) -> None:
    x = np.round(np.random.default_rng(2).normal(size=(50, 32)) * 64) / 64
    plain, shifted = route(x, spec), route(x + 16, spec)  # exact in float32
    np.testing.assert_array_equal(shifted.expert_ids, plain.expert_ids)
    np.testing.assert_array_equal(shifted.weights, plain.weights)


# --- signatures of known faults, in miniature -----------------------------------------------------


def signature(
    right: RouterSpec, wrong: RouterSpec, bias_offset: float = 0.0
) -> tuple[bool, float, float]:
    """(ids are the same sets, mean Σ before, mean Σ after)."""
    rng = np.random.default_rng(3)
    x, bias = rng.normal(size=(200, right.E)), 0.2 * rng.normal(size=right.E) + bias_offset
    a, b = route(x, right, correction_bias=bias), route(x, wrong, correction_bias=bias)
    same = np.array_equal(np.sort(a.expert_ids), np.sort(b.expert_ids))
    return same, float(a.score_sum.mean()), float(b.score_sum.mean())


V3 = spec_of(
    64,
    8,
    scoring_func="sigmoid",
    correction_bias="score",
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    norm_eps=1e-20,
    routed_scaling_factor=2.5,
)


def test_renormalising_olmoe_keeps_ids_and_pins_the_sum_to_1() -> None:
    olmoe = spec_of(64, 8)
    same, before, after = signature(olmoe, olmoe.with_policy(score_order="topk_then_score"))
    assert same and before < 0.7 and after == pytest.approx(1, abs=1e-6)


# With biases far below 0 admissible values are negative, and a mask of 0 outbids them.
@pytest.mark.parametrize(
    ("edit", "bias_offset", "same_ids", "total"),
    [
        ({"weights_from": "biased_scores"}, 0, True, 2.5),
        ({"group_mask_fill": "0"}, -1.5, False, 2.5),
        ({"group_mask_fill": "0"}, +1.5, True, 2.5),
        ({"group_score": "max"}, 0, False, 2.5),
        ({"n_group": 1, "topk_group": 1}, 0, False, 2.5),
        ({"correction_bias": "none"}, 0, False, 2.5),
        ({"scoring_func": "softmax"}, 0, False, 2.5),
        ({"scale_power": 0}, 0, True, 1.0),
        ({"scale_power": 2}, 0, True, 6.25),
        ({"scale_site": "routed_output"}, 0, True, 1.0),
    ],
    ids=str,
)
def test_faults_of_a_grouped_sigmoid_router(
    edit: dict[str, object], bias_offset: float, same_ids: bool, total: float
) -> None:
    same, before, after = signature(V3, V3.with_policy(**edit), bias_offset)
    assert same is same_ids
    assert before == pytest.approx(2.5, abs=1e-5)
    assert after == pytest.approx(total, abs=1e-5)


def test_without_renormalisation_a_sigmoid_sum_leaves_the_factor() -> None:
    same, _, after = signature(V3, V3.with_policy(norm_topk_prob=False))
    assert same and after > 5


def test_sparsemixer_sums_to_between_1_and_2_and_as_softmax_to_1() -> None:
    phi = spec_of(16, 2, scoring_func="sparsemixer", router_jitter_noise=0.01)
    same, before, after = signature(
        phi, phi.with_policy(scoring_func="softmax", norm_topk_prob=True)
    )
    assert same and 1.5 < before < 2 and after == pytest.approx(1, abs=1e-6)


# --- rounding and the gate ------------------------------------------------------------------------


def test_rounding_is_what_torch_does() -> None:
    import torch

    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.arange(0, 2**32, 2**15, dtype=np.uint64).astype(np.uint32)  # ties, and around them
    bits = np.concatenate([bits, edges, edges + 1, edges - 1])
    x = bits.view(np.float32)
    for name in ("bfloat16", "float16"):
        expected = torch.from_numpy(x).to(getattr(torch, name)).double().numpy()
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(round_to(x, name), expected)


def test_gate_logits_round_where_the_spec_says() -> None:
    rng = np.random.default_rng(6)
    hidden, gate, bias = rng.normal(size=(5, 32)), rng.normal(size=(8, 32)), rng.normal(size=8)
    exact = spec_of(8, 2).with_wiring(router_dtype="float32")
    np.testing.assert_allclose(
        gate_logits(hidden, gate, exact, gate_bias=bias), hidden @ gate.T + bias, atol=1e-4
    )
    coarse = gate_logits(hidden, gate, exact.with_wiring(router_dtype="bfloat16"))
    np.testing.assert_array_equal(coarse, round_to(coarse, "bfloat16"))
    quantised = gate_logits(hidden, gate, exact.with_policy(gate_quant_bits=8))
    error = np.abs(quantised - hidden @ gate.T).max()
    assert 1e-4 < error < 0.2
    zero = gate_logits(hidden, np.zeros((8, 32)), exact.with_policy(gate_quant_bits=4))
    assert not zero.any()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "logits", "inputs", "message"),
    [
        (spec_of(8, 2), np.zeros((1, 7)), {}, r"logits: expected \[T, 8\], found \[1, 7\]"),
        (spec_of(8, 2), np.zeros(8), {}, r"logits: expected \[T, 8\], found \[8\]"),
        (spec_of(100, 65), np.zeros((1, 100)), {}, "num_experts_per_tok 65 is more than 64"),
        (spec_of(5000, 2), np.zeros((1, 5000)), {}, "num_experts 5000 is more than 4096"),
        (
            spec_of(8, 2, correction_bias="score"),
            np.zeros((1, 8)),
            {},
            "correction_bias: this router needs it",
        ),
        (
            spec_of(8, 2, per_expert_scale=True),
            np.zeros((1, 8)),
            {"per_expert_scale": np.zeros(7)},
            r"per_expert_scale: expected \[8\] or \[1, 8\], found \[7\]",
        ),
    ],
    ids=["columns", "rank", "K", "E", "bias", "scale"],
)
def test_what_does_not_fit_is_refused_by_name(
    spec: RouterSpec, logits: np.ndarray, inputs: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, spec, **inputs)
    with pytest.raises(ValueError, match=r"backend 'cuda' is none of reference, torch"):
        route(logits, spec, backend="cuda", **inputs)


def test_the_largest_router_is_taken() -> None:
    x = np.random.default_rng(7).normal(size=(2, 4096))
    result = route(x, spec_of(4096, 64))
    expected = np.argsort(-x, axis=1)[:, :64]
    np.testing.assert_array_equal(result.expert_ids, expected)


def test_the_model_dtype_is_that_of_the_logits() -> None:
    import torch

    spec = RouterSpec(RouterPolicy(2), RouterWiring(8))
    logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    full = route(logits, spec)
    assert np.array_equal(full.weights, route(logits, spec.resolved("float32")).weights)
    narrow = torch.from_numpy(logits).bfloat16()
    rounded = route(narrow, spec, backend="torch").weights
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, torch.from_numpy(full.weights))
