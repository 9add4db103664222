"""The fused router on the device against the definition: random policies, many a launch, over ties,
infinities and NaN, in every size it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moescope.kernels import agreement, route
from moescope.kernels.policy_rows import pack_rows
from moescope.kernels.reference import check_spec
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring, Routing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
K_MAX, REPEATS = 32, 20
CHOICES: dict[str, tuple[Any, ...]] = {
    "logits_dtype": ("float32", "bfloat16", "float16"),
    "router_logit_scale": (1.0, 0.5),
    "router_logit_softcapping": (0.0, 0.0, 5.0),
    "scoring_func": ("softmax", "softmax", "sigmoid", "sqrtsoftplus"),
    "score_order": ("score_then_topk", "topk_then_score"),
    "score_passes": (1, 1, 2),
    "score_dtype": ("float32", "float32", "bfloat16"),
    "correction_bias": ("none", "score", "logit"),
    "correction_bias_dtype": ("float32", "bfloat16"),
    "n_group": (1, 1, 4, 8),
    "topk_group": (1, 2, 4),
    "group_score": ("max", "top2_sum"),
    "group_mask_fill": ("-inf", "0"),
    "tie_break": ("lower_id", "lower_id", "higher_id"),
    "weights_from": ("scores", "scores", "biased_scores", "biased_minus_bias", "logits"),
    "norm_topk_prob": (False, True),
    "norm_p": (1.0, 1.0, 2.0),
    "norm_eps": (0.0, 1e-20, 1e-6),
    "norm_eps_mode": ("add", "clamp", "uniform"),
    "per_expert_scale": (False, True),
    "routed_scaling_factor": (1.0, 2.5),
}


def random_specs(count: int, E: int, seed: int) -> list[RouterSpec]:
    """Policies that mean something; most of what is drawn does not go together."""
    random = np.random.default_rng(seed)
    specs: list[RouterSpec] = []
    while len(specs) < count:
        picked = {name: options[random.integers(len(options))] for name, options in CHOICES.items()}
        K = int(random.integers(1, min(E, K_MAX, 12 if len(specs) % 4 else K_MAX) + 1))
        combine = ("float32", "bfloat16")[random.integers(2)]
        try:
            policy = RouterPolicy(K, **picked)
            spec = RouterSpec(policy, RouterWiring(E, combine_dtype=combine)).resolved("float32")
            check_spec(spec)
        except ValueError:
            continue
        specs.append(spec)
    return specs


def hard_logits(T: int, E: int, seed: int) -> NDArray[np.float32]:
    """Rows with ties, with infinities, with NaN, flat and far apart, among ordinary ones."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (T, E)).astype(np.float32)
    logits[0::9] = logits[0::9].round(0)
    logits[1::9] = 0.25
    logits[2::9, ::2] = -np.inf
    logits[3::27, -1] = np.nan
    logits[4::27, 0] = np.inf
    logits[5::9] *= 30
    logits[6::27] = -np.inf
    return logits


def on_host(routing: Routing, place: int, spec: RouterSpec) -> Routing:
    """One place of [T, P, ...], with as many picks as its policy has."""
    fields = {}
    for f in dataclasses.fields(routing):
        value = getattr(routing, f.name)
        if f.name == "logits" or value is None:
            fields[f.name] = None
        else:
            value = value[:, place].cpu().numpy()
            fields[f.name] = value[:, : spec.K] if value.ndim == 2 else value
    return Routing(**fields)


def fused(
    logits: NDArray[np.float32],
    specs: list[RouterSpec],
    row_of: NDArray[np.int32],
    dtype: str = "float32",
    **vectors: NDArray[np.float32],
) -> Routing:
    from moescope.kernels.triton_ops.router import route_rows

    there = {name: torch.from_numpy(value).to(DEVICE) for name, value in vectors.items()}
    return route_rows(
        torch.from_numpy(logits).to(DEVICE, DTYPES[dtype]),
        torch.from_numpy(pack_rows(specs)).float().to(DEVICE),
        torch.from_numpy(row_of).to(DEVICE),
        min(logits.shape[1], K_MAX),
        **there,
    )


@pytest.mark.parametrize("E", [1, 2, 8, 60, 64, 100, 128, 160, 256, 384, 512, 1000, 1024])
def test_random_policies_agree_with_the_definition(E: int) -> None:
    """Sixteen policies for every row in one launch, with learned vectors for those who use them."""
    T, P = 270, 16
    specs = random_specs(P, E, seed=E)
    logits = hard_logits(T, E, seed=E)
    random = np.random.default_rng(E + 1)
    bias = random.normal(0, 0.5, E).astype(np.float32)
    scale = random.uniform(0.5, 1.5, E).astype(np.float32)
    row_of = np.tile(np.arange(P, dtype=np.int32), (T, 1))
    found = fused(logits, specs, row_of, bias=bias, per_expert_scale=scale)
    for place, spec in enumerate(specs):
        p = spec.policy
        used = bias if p.correction_bias != "none" else None
        expected = route(
            logits,
            spec,
            correction_bias=used,
            per_expert_scale=scale if p.per_expert_scale else None,
        )
        wrong = agreement.compare(
            expected, on_host(found, place, spec), spec, logits, correction_bias=used
        )
        assert wrong == [], f"{spec.line()}: {wrong[0]}"
        beyond = found.expert_ids[:, place, spec.K :]
        assert (beyond == -1).all() and not found.weights[:, place, spec.K :].any()


@pytest.mark.parametrize("T, E, K", [(8192, 512, 10), (4096, 128, 8), (8192, 1024, 32), (1, 64, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts_and_one_token(T: int, E: int, K: int, dtype: str) -> None:
    spec = RouterSpec(RouterPolicy(K, norm_topk_prob=True), RouterWiring(E)).resolved("float32")
    logits = np.random.default_rng(T).normal(0, 2, (T, E)).astype(np.float32)
    raw = torch.from_numpy(logits).to(DTYPES[dtype]).float().numpy()
    found = fused(raw, [spec], np.zeros((T, 1), np.int32), dtype)
    place = on_host(found, 0, spec)
    assert agreement.compare(route(raw, spec), place, spec, raw) == []


def test_rows_of_different_policies_and_of_none() -> None:
    T, E, P = 1000, 128, 3
    specs = random_specs(10, E, seed=7)
    specs = [
        s for s in specs if s.policy.correction_bias == "none" and not s.policy.per_expert_scale
    ]
    assert len(specs) > 1
    logits = hard_logits(T, E, seed=8)
    row_of = np.random.default_rng(9).integers(-1, len(specs), (T, P)).astype(np.int32)
    found = fused(logits, specs, row_of)
    for place in range(P):
        nobody = row_of[:, place] < 0
        assert (found.expert_ids[:, place].cpu().numpy()[nobody] == -1).all()
        assert not found.weights[:, place].cpu().numpy()[nobody].any()
        for number, spec in enumerate(specs):
            mine = row_of[:, place] == number
            whole = on_host(found, place, spec)
            part = Routing(
                **{
                    f.name: None if (v := getattr(whole, f.name)) is None else v[mine]
                    for f in dataclasses.fields(whole)
                }
            )
            assert agreement.compare(route(logits[mine], spec), part, spec, logits[mine]) == []


@pytest.mark.parametrize("E, H", [(64, 2048), (128, 2048), (60, 1000), (256, 7168)])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_gate_and_router_in_one_launch(E: int, H: int, T: int) -> None:
    """Its logits are the product, and its routing is what the definition makes of them; launched
    again and again, because the last programs of a launch wait for the others."""
    from moescope.kernels.triton_ops.gate_router import gate_and_route, scratch

    K, policies = 8, ({}, {"norm_topk_prob": True})
    specs = [
        RouterSpec(RouterPolicy(K, **edits), RouterWiring(E)).resolved("bfloat16")
        for edits in policies
    ]
    rows = torch.from_numpy(pack_rows(specs)).float().to(DEVICE)
    row_of = torch.tensor([[0, 1]] * T, dtype=torch.int32, device=DEVICE)
    work = scratch(T, E, H, 1, DEVICE)
    random = np.random.default_rng(E + T)
    gate = torch.from_numpy(random.normal(0, 2 * H**-0.5, (1, E, H))).to(DEVICE, torch.bfloat16)
    for _ in range(REPEATS):
        hidden = torch.from_numpy(random.normal(0, 1, (T, H))).to(DEVICE, torch.bfloat16)
        found = gate_and_route(
            hidden, gate, rows, row_of, K, work, torch.bfloat16, keep_logits=True
        )
        exact = hidden.double() @ gate[0].double().T
        assert (found.logits.double() - exact).abs().max() <= exact.abs().max() * 2.0**-8
        logits = found.logits.cpu().numpy()
        for place, spec in enumerate(specs):
            expected = route(logits, spec)
            assert agreement.compare(expected, on_host(found, place, spec), spec, logits) == []


def test_ids_from_a_table() -> None:
    from moescope.kernels.triton_ops.router import route_triton

    T, E, K, V = 200, 64, 6, 500
    random = np.random.default_rng(4)
    spec = RouterSpec(RouterPolicy(K), RouterWiring(E, hash_table=True)).resolved("float32")
    table = np.stack([random.permutation(E)[:K] for _ in range(V)]).astype(np.int32)
    token_ids = random.integers(0, V, T)
    logits = random.normal(0, 2, (T, E)).astype(np.float32)
    expected = route(logits, spec, token_ids=token_ids, hash_table=table)
    found = route_triton(
        torch.from_numpy(logits).to(DEVICE),
        spec,
        token_ids=torch.from_numpy(token_ids).to(DEVICE),
        hash_table=torch.from_numpy(table).to(DEVICE),
    )
    assert np.array_equal(found.expert_ids.cpu().numpy(), expected.expert_ids)
    assert np.allclose(found.weights.cpu().numpy(), expected.weights, atol=1e-6)


def test_a_policy_changes_in_a_captured_graph() -> None:
    """Rows are read at run time: what was captured follows a toggle."""
    from moescope.kernels.triton_ops.router import empty, route_rows

    T, E, K = 4, 64, 8
    specs = [
        RouterSpec(RouterPolicy(K, **edits), RouterWiring(E)).resolved("bfloat16")
        for edits in ({}, {"norm_topk_prob": True}, {"score_order": "topk_then_score"})
    ]
    logits = np.random.default_rng(5).normal(0, 2, (T, E)).astype(np.float32)
    there = torch.from_numpy(logits).to(DEVICE)
    rows = torch.from_numpy(pack_rows(specs[:1])).float().to(DEVICE)
    row_of = torch.zeros(T, 1, dtype=torch.int32, device=DEVICE)
    out = empty(T, 1, K, DEVICE)
    route_rows(there, rows, row_of, K, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route_rows(there, rows, row_of, K, out=out)
    for spec in (*specs, specs[0]):
        rows.copy_(torch.from_numpy(pack_rows([spec])).float())
        out.expert_ids.fill_(-7)
        graph.replay()
        found = on_host(out, 0, spec)
        assert agreement.compare(route(logits, spec), found, spec, logits) == []
