"""The Triton routers against the reference, under Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.policy_rows import COLUMN, pack, pack_rows
from moescope.kernels.reference import gate_logits, round_to
from moescope.kernels.spec import Routing
from moescope.kernels.triton_ops import arithmetic, columns, gate_router, router
from moescope.variants import CATALOGUE, applicable, apply, parse
from tests.kernels.strategies import KINDS, Case, cases, rows_of

PROPERTY = settings(max_examples=24, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity


def on_triton(logits: np.ndarray, spec: RouterSpec, **inputs: Any) -> Routing:
    tensors = {k: None if v is None else torch.from_numpy(v) for k, v in inputs.items()}
    return to_numpy(router.route_triton(torch.from_numpy(logits), spec, **tensors))


def to_numpy(result: Routing) -> Routing:
    values = {f.name: getattr(result, f.name) for f in fields(Routing)}
    return Routing(**{k: None if v is None else v.numpy() for k, v in values.items()})


def at_place(result: Routing, place: int, K: int) -> Routing:
    """One of P places of [T, P, ...], with as many picks as its policy has."""
    values = {f.name: getattr(result, f.name) for f in fields(Routing) if f.name != "logits"}
    cut = {name: value[:, place].numpy() for name, value in values.items()}
    return Routing(**{name: v[:, :K] if v.ndim == 2 else v for name, v in cut.items()})


def table(specs: list[RouterSpec]) -> torch.Tensor:
    return torch.from_numpy(pack_rows(specs)).float()


@PROPERTY
@given(cases(sizes=(1, 2, 3, 4, 6, 8, 12, 16, 32, 60)))
def test_agrees_with_the_reference(case: Case) -> None:
    expected = route(case.logits, case.spec, **case.inputs)
    found = on_triton(case.logits, case.spec, **case.inputs)
    assert not compare(expected, found, case.spec, case.logits, correction_bias=case.bias)


@pytest.mark.parametrize(("E", "K"), [(96, 8), (256, 32), (1000, 10)])
def test_agrees_in_real_sizes(E: int, K: int) -> None:
    spec = RouterSpec(RouterPolicy(K, norm_topk_prob=True), RouterWiring(E)).resolved("float32")
    rng = np.random.default_rng(E)
    x = np.concatenate([rows_of(kind, 1, E, rng) for kind in KINDS])
    assert not compare(route(x, spec), on_triton(x, spec), spec, x)


GROUPED = {"scoring_func": "sigmoid", "correction_bias": "score", "n_group": 4, "topk_group": 2}
FAMILIES = {
    "softmax": {},
    "grouped": {**GROUPED, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "sparse": {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_the_catalogue_beside_the_others(family: str) -> None:
    """One launch routes each row under every variant that applies; the last place is empty."""
    spec = RouterSpec(RouterPolicy(2, **FAMILIES[family]), RouterWiring(16)).resolved("bfloat16")
    names = [n for n in CATALOGUE if applicable(n, spec) and parse(n).on_logits]
    specs = [apply(name, spec, 0) for name in names]
    rng = np.random.default_rng(3)
    x = np.concatenate([rows_of("ties", 1, 16, rng), rows_of("negative", 1, 16, rng)])
    bias = np.round(rng.normal(size=16) * 4).astype(np.float32) / 4
    K_max, P = max(s.K for s in specs), len(specs) + 1
    row_of = torch.tensor([[*range(P - 1), -1]] * 2, dtype=torch.int32)
    found = router.route_rows(
        torch.from_numpy(x), table(specs), row_of, K_max, torch.from_numpy(bias)
    )
    for place, (name, variant) in enumerate(zip(names, specs, strict=True)):
        expected = route(x, variant, correction_bias=bias)
        here = at_place(found, place, variant.K)
        assert not compare(expected, here, variant, x, correction_bias=bias), name
        assert (found.expert_ids[:, place, variant.K :] == -1).all()
        assert not found.weights[:, place, variant.K :].any()
    assert (found.expert_ids[:, -1] == -1).all() and (found.runner_up[:, -1] == -1).all()
    assert not found.weights[:, -1].any() and not found.score_sum[:, -1].any()


def test_scores_far_below_one_keep_their_digits() -> None:
    """sqrt(softplus(-150)) is 3e-33, though e^-150 is nothing in float32 (SGLang #34459)."""
    policy = RouterPolicy(2, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    spec = RouterSpec(policy, RouterWiring(8)).resolved("float32")
    x = np.linspace([-15, -40, -95, -150], [-25, -60, -105, -170], 8, dtype=np.float32).T
    expected, found = route(x, spec), on_triton(x, spec)
    assert not compare(expected, found, spec, x)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_and_room_of_the_caller(dtype: torch.dtype) -> None:
    """bfloat16 logits take the short keys; the caller's arrays are written, and nothing else."""
    spec = RouterSpec(RouterPolicy(3), RouterWiring(16)).resolved("float32")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).round(decimals=1).to(dtype)
    x[0, 3] = x[0, 5] = 2.0
    out = router.empty(2, 1, 3, "cpu", 16)
    row_of = torch.zeros(2, 1, dtype=torch.int32)
    result = router.route_rows(x, table([spec]), row_of, 3, out=out)
    assert result is out and torch.equal(out.logits, x.float())
    expected = route(x.float().numpy(), spec)
    assert not compare(expected, at_place(out, 0, 3), spec, x.float().numpy())
    np.testing.assert_array_equal(out.expert_ids[:, 0].numpy(), expected.expert_ids)


def test_learned_vectors_of_several_routers() -> None:
    policy = RouterPolicy(2, scoring_func="sigmoid", correction_bias="score", per_expert_scale=True)
    spec = RouterSpec(policy, RouterWiring(8)).resolved("float32")
    rng = np.random.default_rng(5)
    x, bias, scale = (rng.normal(size=(3, 8)).astype(np.float32) for _ in range(3))
    inputs = {"correction_bias": bias, "per_expert_scale": scale}
    found = on_triton(x, spec, **inputs)
    assert not compare(route(x, spec, **inputs), found, spec, x, correction_bias=bias)


def test_what_it_does_not_cover_goes_to_torch() -> None:
    assert router.covers(128, 8) == router.covers(1024, 32) == ""
    assert "1025 experts" in router.covers(1025, 8) and "33 picks" in router.covers(64, 33)
    spec = RouterSpec(RouterPolicy(33), RouterWiring(40)).resolved("float32")
    x = rows_of("normal", 2, 40, np.random.default_rng(0))
    assert not compare(route(x, spec), on_triton(x, spec), spec, x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "hash_table: this router needs token_ids and hash_table"),
        ({"token_ids": np.zeros(3, int), "hash_table": np.zeros((2, 2), int)}, r"expected \[2\]"),
        ({"token_ids": np.zeros(2, int), "hash_table": np.zeros((2, 1), int)}, r"\[V, 2\]"),
    ],
)
def test_missing_and_misshapen_inputs_are_refused(inputs: dict[str, Any], message: str) -> None:
    spec = RouterSpec(RouterPolicy(2), RouterWiring(8, hash_table=True)).resolved("float32")
    with pytest.raises(ValueError, match=message):
        on_triton(np.zeros((2, 8), np.float32), spec, **inputs)


def test_columns_have_the_names_of_policy_rows() -> None:
    named = {name: getattr(columns, name.upper()).value for name in COLUMN}
    assert named == COLUMN


# --- the gate in the same launch ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_and_router_together(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of the width, two copies of the gate, rows that read different ones; replayed
    over the wrap of the arrival counter."""
    monkeypatch.setattr(gate_router, "PART", 16)
    T, H, E, G, K = 2, 40, 6, 2, 3
    wiring = RouterWiring(E, router_dtype=dtype, gate_bias=True)
    spec = RouterSpec(RouterPolicy(K), wiring).resolved("float32")
    other = spec.with_policy(num_experts_per_tok=2, norm_topk_prob=True)
    rows = torch.from_numpy(np.stack([pack(spec), pack(other, gate=1)])).float()
    row_of = torch.tensor([[0, 1, -1], [1, 0, 1]], dtype=torch.int32)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=rng).bfloat16()
    gate = torch.randn(G, E, H, generator=rng).bfloat16()
    gate_bias = torch.randn(E, generator=rng).bfloat16()
    work = gate_router.scratch(T, E, H, G, "cpu")
    programs = 64  # the power of two that holds G x 3 x E
    work.arrivals.fill_(2**31 - programs)
    for _ in range(2):
        work.partials.fill_(float("nan"))
        out = gate_router.gate_and_route(
            *(hidden, gate, rows, row_of, K, work, getattr(torch, dtype), gate_bias),
            keep_logits=True,
        )
        for t, names in enumerate(row_of.tolist()):
            for place, row in enumerate(names):
                if row < 0:
                    assert (out.expert_ids[t, place] == -1).all()
                    continue
                one = (spec, other)[row]
                x = gate_logits(
                    hidden[t : t + 1].float().numpy(),
                    gate[row].float().numpy(),
                    one,
                    gate_bias=gate_bias.float().numpy(),
                )
                here = at_place(out, place, one.K)
                mine = Routing(**{f: getattr(here, f)[t : t + 1] for f in NAMES})
                assert not compare(route(x, one), mine, one, x)
                if place == 0:
                    np.testing.assert_allclose(out.logits[t : t + 1], x, rtol=2e-6, atol=2e-6)
    assert work.arrivals.item() == -(2**31) + programs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gate_with_learned_vectors_and_a_norm_of_its_own(dtype: str) -> None:
    """As Gemma 4 and DeepSeek have them, at once: a scaled norm before the gate, a correction bias
    for the choice, a scale for every expert."""
    T, H, E, K = 2, 40, 8, 3
    policy = RouterPolicy(
        *(K,), scoring_func="sigmoid", correction_bias="score", per_expert_scale=True
    )
    spec = RouterSpec(policy, RouterWiring(E, router_dtype=dtype)).resolved("float32")
    rng = torch.Generator().manual_seed(4)
    kind = getattr(torch, dtype)
    hidden, gate = (torch.randn(n, H, generator=rng).to(kind) for n in (T, E))
    by = torch.randn(H, generator=rng).to(kind)
    bias, scale = (torch.randn(E, generator=rng) for _ in range(2))
    out = gate_router.gate_and_route(
        *(hidden, gate[None], table([spec]), torch.zeros(T, 1, dtype=torch.int32), K),
        *(gate_router.scratch(T, E, H, 1, "cpu"), kind, None, bias, scale),
        norm=by,
        eps=1e-3,
        scale=H**-0.5,
        keep_logits=True,
    )
    unit = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + 1e-3)
    seen = (unit.to(kind) * by) * H**-0.5
    logits = (seen.float() @ gate.float().T).to(kind).float().numpy()
    np.testing.assert_allclose(out.logits.numpy(), logits, atol=2e-6 if dtype == "float32" else 0.0)
    vectors = {"correction_bias": bias.numpy(), "per_expert_scale": scale.numpy()}
    here = at_place(out, 0, K)
    assert not compare(
        route(logits, spec, **vectors), here, spec, logits, correction_bias=bias.numpy()
    )


NAMES = [f.name for f in fields(Routing) if f.name != "logits"]


def test_the_fused_gate_says_what_it_covers() -> None:
    assert gate_router.covers(8, 128, 8) == ""
    assert "9 rows" in gate_router.covers(9, 128, 8)
    assert "experts" in gate_router.covers(1, 2000, 8)


# --- arithmetic -----------------------------------------------------------------------------------


@triton.jit
def _apply(x, y, exp, log, half, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(exp + i, arithmetic.exp_of_difference(a, b))
    tl.store(log + i, arithmetic.log1p(tl.minimum(tl.abs(a), 1.0)))
    tl.store(half + i, arithmetic.to_bfloat16(a))


def test_elementary_functions_are_right_to_two_ulp() -> None:
    """Down to denormals, where a hardware exponential is 0, and for differences float32 rounds."""
    rng = np.random.default_rng(2)
    y = np.abs(rng.normal(size=512) * 30).astype(np.float32)
    x = np.minimum(rng.normal(size=512) * 40, y).astype(np.float32)
    x[:3], y[:3] = (1e-7, -101.0, 5.0), (80.0, 0.0, 5.0)
    exp, log, half = (torch.empty(512) for _ in range(3))
    _apply[(1,)](torch.from_numpy(x), torch.from_numpy(y), exp, log, half, 512)
    assert (ulps(exp, np.exp(x.astype(float) - y)) <= 2).all()
    assert (ulps(log, np.log1p(np.minimum(np.abs(x.astype(float)), 1))) <= 2).all()
    np.testing.assert_array_equal(half.numpy(), round_to(x, "bfloat16"))


def ulps(found: torch.Tensor, exact: np.ndarray) -> np.ndarray:
    step = np.spacing(np.abs(exact).astype(np.float32)).astype(float)
    return np.abs(found.numpy() - exact) / step
