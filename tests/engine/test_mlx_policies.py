"""Policies on MLX: a lane's own, changed while it runs, shadows, experts, and the compiled step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine.mlx_decoder import compiles
from moescope.kernels import route
from moescope.kernels.reference import gate_logits
from tests.engine.mlx_tiny import (
    IDS,
    checkpoint_of,
    compiling_in,
    fresh,
    on_mlx,
    on_torch,
    same,
)
from tests.oracle.matrix import BY_FAMILY
from tests.tiny import VOCAB, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


# --- policies and shadows -----------------------------------------------------------------------


def test_policies_belong_to_lanes(folder: Path) -> None:
    """Lanes under different policies in one call: each routes as the reference says it should."""
    model = fresh(folder, lanes=3)
    trained = [router.spec.policy for router in model.routers]
    small = [replace(policy, num_experts_per_tok=1) for policy in trained]
    large = [replace(policy, num_experts_per_tok=6, norm_topk_prob=True) for policy in trained]
    mixed = [*small[:2], *trained[2:]]
    model.set_policies(0, mixed)
    model.set_policies(2, large)
    for tokens in (IDS[:3], IDS[:3, :1]):
        out = model.run([0, 1, 2], tokens, record="logits")
        assert out.expert_ids.shape[-1] == 6
        assert out.router_logits is not None and out.weights is not None
        for lane, policies in enumerate((mixed, trained, large)):
            for index, policy in enumerate(policies):
                spec = replace(model.routers[index].spec, policy=policy)
                wanted = route(out.router_logits[lane, :, index], spec)
                K = policy.num_experts_per_tok
                assert (out.expert_ids[lane, :, index, :K] == wanted.expert_ids).all()
                assert (out.expert_ids[lane, :, index, K:] == -1).all()
                assert (out.weights[lane, :, index, K:] == 0).all()
                assert np.allclose(out.weights[lane, :, index, :K], wanted.weights, atol=1e-6)
                assert np.allclose(out.score_sum[lane, :, index], wanted.score_sum, atol=1e-6)
                assert np.allclose(out.margin[lane, :, index], wanted.margin, atol=1e-6)
                assert (out.runner_up[lane, :, index] == wanted.runner_up).all()
        assert np.allclose(out.score_sum[2], 1.0, atol=1e-6)


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"norm_topk_prob": True},
    {"num_experts_per_tok": 5},
    {"scoring_func": "sigmoid", "routed_scaling_factor": 0.5},
    {"score_order": "topk_then_score"},
    {"gate_quant_bits": 4},
    {"routed_scaling_factor": 2.5, "scale_site": "routed_output"},
    {"n_group": 2, "topk_group": 1, "group_score": "max"},
)


def test_lanes_under_variants_are_separate_runs_and_torch_agrees(folder: Path) -> None:
    """Eight variants decode side by side, prompts and all, as each does alone and in torch."""
    path = tiny_checkpoint("olmoe", folder)
    model, alone, beside = on_mlx(path, lanes=8), on_mlx(path), on_torch(path)
    trained = [router.spec.policy for router in model.routers]
    policies = [[replace(policy, **edits) for policy in trained] for edits in VARIANTS]
    for lane, chosen in enumerate(policies):
        model.set_policies(lane, chosen)
    lanes = list(range(8))
    model.run(lanes, IDS[:1].repeat(8, 0))
    outs = [model.run(lanes, IDS[1:2, at : at + 1].repeat(8, 0)) for at in range(6)]
    for lane, chosen in enumerate(policies):
        for other, near in ((alone, 5e-5), (beside, 1e-4)):
            other.truncate(0, 0)
            other.set_policies(0, chosen)
            other.run([0], IDS[:1])
            for at, out in enumerate(outs):
                wanted = other.run([0], IDS[1:2, at : at + 1])
                K = chosen[0].num_experts_per_tok
                assert (out.expert_ids[lane, ..., :K] == wanted.expert_ids[0]).all(), VARIANTS[lane]
                assert np.abs(out.logits[lane] - wanted.logits[0]).max() < near, VARIANTS[lane]
    assert len({outs[-1].logits[lane].tobytes() for lane in lanes}) == 8


@pytest.mark.parametrize("tokens", [1, 5])
def test_shadows_route_the_same_logits_and_change_nothing(folder: Path, tokens: int) -> None:
    model = fresh(folder, lanes=2)
    trained = [router.spec.policy for router in model.routers]
    variants = (
        [replace(policy, norm_topk_prob=True) for policy in trained],
        [replace(policy, num_experts_per_tok=5) for policy in trained],
    )
    plain = model.run([0, 1], IDS[:2, :tokens], record="logits")
    for lane in (0, 1):
        model.truncate(lane, 0)
    model.set_shadows(variants)
    out = model.run([0, 1], IDS[:2, :tokens], record="logits")
    assert plain.shadow_ids is None
    for name in ("logits", "expert_ids", "weights", "margin", "router_logits"):
        assert np.array_equal(getattr(out, name), getattr(plain, name)), name
    assert out.shadow_ids is not None and out.shadow_ids.shape == (2, tokens, 2, 4, 5)
    assert out.shadow_weights is not None and out.shadow_sums is not None
    assert out.router_logits is not None
    for place, policies in enumerate(variants):
        for index, policy in enumerate(policies):
            spec = replace(model.routers[index].spec, policy=policy)
            wanted = route(out.router_logits[:, :, index].reshape(-1, 8), spec)
            ids = out.shadow_ids[:, :, place, index].reshape(-1, 5)
            weights = out.shadow_weights[:, :, place, index].reshape(-1, 5)
            K = policy.num_experts_per_tok
            assert (ids[:, :K] == wanted.expert_ids).all() and (ids[:, K:] == -1).all()
            assert np.allclose(weights[:, :K], wanted.weights, atol=1e-6)
            sums = out.shadow_sums[:, :, place, index].reshape(-1)
            assert np.allclose(sums, wanted.score_sum, atol=1e-6)


def test_a_shadow_may_round_the_gate(folder: Path) -> None:
    """The lane keeps the gate as stored; the shadow routes what its own gate gives, as a lane under
    that variant does."""
    model = fresh(folder, lanes=2)
    rounded = [replace(router.spec.policy, gate_quant_bits=3) for router in model.routers]
    plain = model.run([0], IDS[:1], record="logits")
    model.set_policies(1, rounded)
    variant = model.run([1], IDS[:1], record="logits")
    model.truncate(0, 0)
    model.set_shadows([rounded])
    out = model.run([0], IDS[:1], record="logits")
    assert np.array_equal(out.expert_ids, plain.expert_ids)
    assert np.array_equal(out.router_logits, plain.router_logits)
    assert out.shadow_ids is not None
    assert (out.shadow_ids[0, :, 0, 0] == variant.expert_ids[0, :, 0]).all()  # hidden states agree
    assert (out.shadow_ids[0, :, 0, 0] != plain.expert_ids[0, :, 0]).any()


def test_a_policy_changes_what_follows_and_trained_restores(folder: Path) -> None:
    model = fresh(folder)
    trained = [router.spec.policy for router in model.routers]
    before = model.run([0], IDS[:1], record="logits")
    model.truncate(0, 0)
    model.set_policies(0, [replace(policy, norm_topk_prob=True) for policy in trained])
    changed = model.run([0], IDS[:1], record="logits")
    assert np.abs(changed.logits - before.logits).max() > 1e-2
    model.truncate(0, 0)
    model.set_policies(0, trained)
    assert same(model.run([0], IDS[:1], record="logits"), before, 0)


def test_a_rounded_gate_is_the_references(folder: Path) -> None:
    import mlx.core as mx

    model = fresh(folder)
    router: Any = model.forward.stages[0].branches[1][1]
    spec = model.routers[0].spec.with_policy(gate_quant_bits=4)
    h = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    wanted = gate_logits(h, np.array(router.router.gates[0].whole()), spec)
    assert np.allclose(np.array(router.router._gate(4)(mx.array(h))), wanted, atol=1e-5)


# --- experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_experts_are_the_plain_sum(folder: Path, on_input: bool, rows: int) -> None:
    """Sorted by expert or as they come: the weighted sum over the picks, empty slots (-1) and null
    experts (ids from E on) left out, the weight on the output or on the input."""
    import mlx.core as mx

    experts: Any = fresh(folder).forward.stages[0].branches[1][1]
    experts = experts.experts
    experts.wiring = replace(experts.wiring, apply_router_weight_on_input=on_input)
    rng = np.random.default_rng(rows)
    h = rng.normal(size=(rows, 64)).astype(np.float32)
    ids = np.stack([rng.permutation(10)[:4] for _ in range(rows)]).astype(np.int32)
    ids[0, 1] = -1
    if rows > 2:
        ids[2] = -1  # a row that was not valid
        h[2] = np.nan
    weights = rng.random((rows, 4)).astype(np.float32)
    gate_up, down = (np.array(m.whole()) for m in (experts.gate_up, experts.down))
    wanted = np.zeros((rows, 64), np.float32)
    for r, k in np.ndindex(rows, 4):
        if 0 <= (e := int(ids[r, k])) < 8:
            x = h[r] * weights[r, k] if on_input else h[r]
            gate, up = np.split(gate_up[e] @ x, 2)
            part = down[e] @ (gate / (1 + np.exp(-gate)) * up)
            wanted[r] += part if on_input else part * weights[r, k]
    found = np.array(experts(mx.array(h), mx.array(ids), mx.array(weights)))
    assert np.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("position", [0, 5])
def test_invalid_router_is_named(folder: Path, position: int) -> None:
    import mlx.core as mx

    model = fresh(folder)
    moe: Any = model.forward.stages[2].branches[1][1]
    broken = np.array(moe.router.gates[0].whole())
    broken[3, 7] = np.nan
    moe.router.gates = {0: type(moe.router.gates[0])(mx.array(broken))}
    if position:
        model.run([0], IDS[:1, :position], record="ids")
    out = model.run([0], IDS[:1, position : position + 1])
    assert out.invalid_router == 2
    assert (out.expert_ids[0, 0, 2] == -1).all() and np.isnan(out.score_sum[0, 0, 2])
    assert (out.expert_ids[0, 0, :2] >= 0).all()


# --- the compiled step --------------------------------------------------------------------------


@pytest.mark.parametrize("case", [cases[0] for cases in BY_FAMILY.values()], ids=lambda c: c.id)
def test_every_familys_step_can_be_written_down(case: Any, folder: Path) -> None:
    """What compiling begins with: the step of two lanes on arrays that hold nothing yet, which
    fails where a value were asked for. Nothing is compiled here, for nothing is evaluated."""
    import mlx.core as mx

    model = on_mlx(checkpoint_of(case, folder), lanes=2)
    policies = model._policies_of((0, 1))
    static, inputs = model._prepared((0, 1), IDS[:2, :1], policies, False, True)
    whole, states = mx.compile(partial(model.forward, static))(*inputs, model._states.held)
    L = len(model.routers)
    assert whole[0].shape == (2, VOCAB) and [a.shape[:2] for a in whole[1:]] == [(L, 2)] * 3
    for arrays, held in zip(states, model._states.held, strict=True):
        assert [a.shape for a in arrays] == [a.shape for a in held]


@pytest.mark.slow
@pytest.mark.timeout(600)  # a C++ compiler runs for every kernel of the step
def test_the_compiled_step_is_the_plain_one_and_toggles_trace_nothing(
    folder: Path, tmp_path: Path
) -> None:
    """The same numbers. Policies and positions are data of the step: it is written down once for
    every number of experts."""
    path = tiny_checkpoint("olmoe", folder / "two", num_hidden_layers=2)
    plain, model = on_mlx(path), on_mlx(path)
    model.compiled = compiles()
    trained = [router.spec.policy for router in model.routers]
    steps = []
    with compiling_in(tmp_path):
        for edits in ({}, {}, {"norm_eps": 0.5}, {"num_experts_per_tok": 2}, {}, {"more": 1}, {}):
            more = {"num_experts_per_tok": 4} if "more" in edits else edits
            for one in (plain, model):
                one.set_policies(0, [replace(policy, **more) for policy in trained])
            token = IDS[:1, len(steps) : len(steps) + 1]
            wanted = plain.run([0], token, record="logits")
            assert same(model.run([0], token, record="logits"), wanted, 0, 0, 2e-5)
            steps.append(model.traced)
    assert steps == ([1, 1, 1, 2, 2, 3, 3] if compiles() else [1, 2, 3, 4, 5, 6, 7])
    assert plain.traced == 7


def test_what_a_step_is_compiled_for(folder: Path) -> None:
    """The number of experts; and in plain operators also which steps of a policy there are: the
    Metal kernel reads policies whole."""
    model = fresh(folder)
    trained = [router.spec.policy for router in model.routers]

    def static(**edits: Any) -> Any:
        model.set_policies(0, [replace(policy, **edits) for policy in trained])
        policies = model._policies_of((0,))
        return model._prepared((0,), IDS[:1, :1], policies, False, False)[0]

    first = static()
    assert static(norm_topk_prob=True, norm_eps=0.1) == first
    assert static(scoring_func="sigmoid") != first
    assert static(num_experts_per_tok=4) != first
    model._traces_fields = False
    first = static()
    assert static(scoring_func="sigmoid", n_group=2, topk_group=1) == first
    assert static(num_experts_per_tok=4) != first
    assert static(scale_site="routed_output", routed_scaling_factor=2.0) != first
