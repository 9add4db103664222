"""The torch interpreter as a session sees it: lanes, lengths, policies, records, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine.interpreter import StepOutput
from moescope.engine.limits import refuse_unsupported
from moescope.engine.load import load_model
from moescope.engine.operators import Attention
from moescope.engine.protocol import LoadRequest
from moescope.engine.torch_decoder import TorchDecoder
from moescope.engine.torch_operators import attention as torch_attention
from moescope.errors import MoescopeError
from moescope.kernels import route
from moescope.kernels.reference import gate_logits
from tests.tiny import VOCAB, tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def fresh(folder: Path, family: str = "olmoe", lanes: int = 1, **options: Any) -> TorchDecoder:
    path = tiny_checkpoint(family, folder)
    model = load_model(LoadRequest(str(path), device="cpu", **options)).interpreter
    assert isinstance(model, TorchDecoder)
    model.open(lanes, 64)
    return model


def same(
    a: StepOutput, b: StepOutput, lane_a: int, lane_b: int = 0, tolerance: float = 0.0
) -> bool:
    """Whether two outputs say the same of two lanes, in every array."""
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray) and not np.allclose(
            x[lane_a], y[lane_b], rtol=0, atol=tolerance, equal_nan=True
        ):
            return False
    return True


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_lanes_in_one_batch_are_lanes_alone(folder: Path, family: str) -> None:
    """Four lanes of different lengths, decoded as one batch, against each of them alone."""
    together = fresh(folder, family, lanes=4)
    lengths = (3, 9, 1, 12)
    for lane, length in enumerate(lengths):
        together.run([lane], IDS[lane : lane + 1, :length])
    token = np.array([[11], [22], [33], [44]])
    order = [2, 0, 3, 1]
    out = together.run(order, token, record="logits")
    for place, lane in enumerate(order):
        alone = fresh(folder, family)
        alone.run([0], IDS[lane : lane + 1, : lengths[lane]])
        assert together.length(lane) == lengths[lane] + 1
        assert same(out, alone.run([0], token[place : place + 1], record="logits"), place, 0, 2e-5)


def test_prefill_of_several_lanes_at_once(folder: Path) -> None:
    together = fresh(folder, lanes=4)
    out = together.run([0, 1, 2, 3], IDS, all_logits=True, record="logits")
    assert out.logits.shape == (4, 12, VOCAB) and out.expert_ids.shape == (4, 12, 4, 3)
    assert out.router_logits is not None and out.router_logits.shape == (4, 12, 4, 8)
    for lane in range(4):
        alone = fresh(folder)
        one = alone.run([0], IDS[lane : lane + 1], all_logits=True, record="logits")
        assert same(out, one, lane, 0, 2e-5)


def test_last_logits_only_and_records(folder: Path) -> None:
    model = fresh(folder)
    out = model.run([0], IDS[:1], record="ids")
    assert out.logits.shape == (1, 1, VOCAB)
    assert out.weights is None and out.scores is None and out.router_logits is None
    assert out.expert_ids.dtype == np.int16 and out.score_sum.dtype == np.float32


@pytest.mark.parametrize("lanes", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lanes_that_do_the_same_get_the_same_bits(folder: Path, lanes: int, dtype: str) -> None:
    """Whatever their number and place, and whatever a lane beside them does: else two equal
    variants would part at the first near tie."""
    model = fresh(folder, "qwen2_moe", lanes=lanes + 1, dtype=dtype)
    everyone = list(range(lanes + 1))
    model.run(everyone, np.concatenate([IDS[:1].repeat(lanes, 0), IDS[1:2]]))
    other = [replace(r.spec.policy, num_experts_per_tok=2) for r in model.routers]
    model.set_policies(lanes, other)
    token = 7
    for _ in range(12):
        tokens = np.array([[token]] * lanes + [[token + 1]])
        out = model.run(everyone, tokens, record="logits")
        assert all(same(out, out, lane, 0) for lane in range(1, lanes))
        token = int(out.logits[0, 0].argmax()) % 255


def test_masks_in_blocks_are_masks_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries against a window, and against cached keys, in blocks of any size."""
    path = tiny_checkpoint("mixtral", tmp_path, sliding_window=5)
    model = load_model(LoadRequest(str(path), device="cpu")).interpreter

    def run() -> list[Any]:
        model.truncate(0, 0)
        first = model.run([0], IDS[:1], all_logits=True).logits
        return [first, model.run([0], IDS[1:2], all_logits=True).logits]

    whole = run()
    for block in (1, 3, 12):
        monkeypatch.setattr(torch_attention, "QUERY_BLOCK", block)
        for a, b in zip(whole, run(), strict=True):
            assert np.allclose(a, b, atol=2e-5)


def test_same_calls_give_the_same_bits(folder: Path) -> None:
    runs = []
    for _ in range(2):
        model = fresh(folder, "qwen2_moe")
        runs.append(model.run([0], IDS[:1], all_logits=True, record="logits"))
    assert same(runs[0], runs[1], 0)


def test_truncate_and_copy(folder: Path) -> None:
    """A lane cut back or forked goes on as if it had never been longer."""
    model = fresh(folder, lanes=3)
    model.run([0], IDS[:1, :8])
    model.copy(0, 2, 5)
    model.truncate(0, 5)
    assert (model.length(0), model.length(1), model.length(2)) == (5, 0, 5)
    out = model.run([0, 2], np.array([[7], [7]]), record="logits")
    alone = fresh(folder)
    alone.run([0], IDS[:1, :5])
    wanted = alone.run([0], np.array([[7]]), record="logits")
    assert same(out, wanted, 0, 0, 2e-5) and same(out, wanted, 1, 0, 2e-5)


def test_growing_loses_nothing(folder: Path) -> None:
    model = fresh(folder)
    model.run([0], IDS[:1, :6])
    before = model.run([0], np.array([[9]]), record="logits")
    model.truncate(0, 6)
    model.open(3, 200)
    assert same(model.run([0], np.array([[9]]), record="logits"), before, 0)
    model.open(1, 8)  # never shrinks
    model.run([2], IDS[:1])
    assert model.length(2) == 12


def test_policies_belong_to_lanes(folder: Path) -> None:
    """Lanes under different policies in one call: each routes as the reference says it should."""
    model = fresh(folder, lanes=3)
    trained = [router.spec.policy for router in model.routers]
    small = [replace(policy, num_experts_per_tok=1) for policy in trained]
    large = [replace(policy, num_experts_per_tok=6, norm_topk_prob=True) for policy in trained]
    mixed = [*small[:2], *trained[2:]]
    model.set_policies(0, mixed)
    model.set_policies(2, large)
    out = model.run([0, 1, 2], IDS[:3], record="logits")
    assert out.expert_ids.shape[-1] == 6
    assert out.router_logits is not None and out.weights is not None and out.scores is not None
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


def test_scale_on_the_routed_output_equals_scale_on_the_weights(folder: Path) -> None:
    model = fresh(folder, lanes=2)
    trained = [router.spec.policy for router in model.routers]
    scaled = [replace(policy, routed_scaling_factor=2.5) for policy in trained]
    model.set_policies(0, scaled)
    model.set_policies(1, [replace(policy, scale_site="routed_output") for policy in scaled])
    out = model.run([0, 1], np.concatenate([IDS[:1], IDS[:1]]))
    assert np.allclose(out.logits[0], out.logits[1], atol=1e-4)
    assert np.allclose(out.score_sum[0, :, 0], 2.5 * out.score_sum[1, :, 0], atol=1e-5)


def test_quantised_gate_is_the_reference_gate(folder: Path) -> None:
    """`gate_quant_bits` changes the gate that is used, as `kernels.gate_logits` defines it."""
    model = fresh(folder)
    moe = model._stages[0].branches[1][1]
    policies = [replace(router.spec.policy, gate_quant_bits=4) for router in model.routers]
    model.set_policies(0, policies)
    h = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    spec = replace(model.routers[0].spec, policy=policies[0])
    wanted = gate_logits(h.numpy(), moe.router.gate.numpy(), spec)
    found = torch.nn.functional.linear(h, moe.router._gate(4))
    assert np.allclose(found.numpy(), wanted, atol=1e-5)
    assert np.abs(wanted - (h @ moe.router.gate.T).numpy()).max() > 0.05
    out = model.run([0], IDS[:1], record="logits")
    plain = fresh(folder).run([0], IDS[:1], record="logits")
    assert out.router_logits is not None and plain.router_logits is not None
    assert np.abs(out.router_logits - plain.router_logits)[..., 0, :].max() > 1e-3


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_experts_are_the_plain_sum(folder: Path, on_input: bool, rows: int) -> None:
    """Sorted by expert or one by one: the weighted sum over the picks, empty slots (-1) and null
    experts (ids from E on) left out, the weight on the output or on the input."""
    experts = fresh(folder)._stages[0].branches[1][1].experts
    experts.wiring = replace(experts.wiring, apply_router_weight_on_input=on_input)
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, 64, generator=generator)
    ids = torch.stack([torch.randperm(10, generator=generator)[:4] for _ in range(rows)]).int()
    ids[0, 1] = -1
    weights = torch.rand(rows, 4, generator=generator)
    wanted = torch.zeros(rows, 64)
    for r, k in np.ndindex(rows, 4):
        if 0 <= (e := int(ids[r, k])) < 8:
            x = h[r] * weights[r, k] if on_input else h[r]
            gate, up = (experts.gate_up[e] @ x).chunk(2)
            part = experts.down[e] @ (torch.nn.functional.silu(gate) * up)
            wanted[r] += part if on_input else part * weights[r, k]
    assert np.allclose(experts(h, ids, weights).numpy(), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("position", [0, 5])
def test_invalid_router_is_named(folder: Path, position: int) -> None:
    model = fresh(folder)
    broken = model._stages[2].branches[1][1]
    broken.router.gate[3, 7] = float("nan")
    if position:
        model.run([0], IDS[:1, :position], record="ids")
    out = model.run([0], IDS[:1, position : position + 1])
    assert out.invalid_router == 2
    assert (out.expert_ids[0, 0, 2] == -1).all() and np.isnan(out.score_sum[0, 0, 2])
    assert (out.expert_ids[0, 0, :2] >= 0).all()


def test_valid_runs_name_no_router(folder: Path) -> None:
    assert fresh(folder).run([0], IDS[:1]).invalid_router is None


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40])
def test_ids_outside_the_vocabulary_are_refused(folder: Path, wrong: int) -> None:
    model = fresh(folder)
    with pytest.raises(MoescopeError, match=f"token id {wrong}: expected 0..{VOCAB - 1}"):
        model.run([0], np.array([[1, wrong]]))
    assert model.length(0) == 0


def test_a_full_lane_is_refused(folder: Path) -> None:
    model = fresh(folder)
    room = model.shared.capacity
    model.run([0], np.zeros((1, room), np.int64))
    with pytest.raises(MoescopeError, match=f"at most {room} tokens, {room + 1} are needed"):
        model.run([0], np.array([[1]]))
    assert model.length(0) == room


def test_more_experts_than_a_kernel_has_room_for_are_refused(folder: Path) -> None:
    model = fresh(folder)
    policies = [replace(r.spec.policy, num_experts_per_tok=9) for r in model.routers]
    with pytest.raises(MoescopeError, match=r"num_experts_per_tok: expected 1\.\.8, found 9"):
        model.set_policies(0, policies)


def test_cache_bytes_are_what_open_allocates(folder: Path) -> None:
    model = fresh(folder, lanes=3)
    held = sum(cache.nbytes for cache in model.shared.caches)
    assert model.cache_bytes(3, model.shared.capacity) == held


def test_what_the_interpreter_does_not_do_is_refused_by_field(folder: Path) -> None:
    spec = fresh(folder).spec
    branch = spec.layers[1].branches[0]
    assert isinstance(branch.operator, Attention)
    borrowing = replace(branch, operator=replace(branch.operator, shares_kv_of=0))
    wrong = replace(spec.layers[1], branches=(borrowing, *spec.layers[1].branches[1:]))
    with pytest.raises(MoescopeError, match=r"Attention\.shares_kv_of 0: not implemented"):
        refuse_unsupported(replace(spec, layers=(spec.layers[0], wrong, *spec.layers[2:])))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(folder: Path, dtype: str) -> None:
    """Decoding is as prefilling, near the float32 run; weights are of the combine dtype."""
    for family in ("olmoe", "mixtral"):
        model = fresh(folder, family, dtype=dtype)
        out = model.run([0], IDS[:1], all_logits=True, record="logits")
        wanted = fresh(folder, family).run([0], IDS[:1], all_logits=True)
        assert np.median(np.abs(out.logits - wanted.logits)) < 0.2
        model.truncate(0, 0)
        steps = [model.run([0], IDS[:1, i : i + 1]).logits[0, 0] for i in range(12)]
        assert np.median(np.abs(np.stack(steps) - out.logits[0])) < 0.2
        assert out.weights is not None
        weights = torch.from_numpy(out.weights)
        rounded = weights.to(getattr(torch, dtype)).float()
        assert bool((rounded == weights).all()) == (family == "olmoe")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(folder: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", folder)
    model = load_model(LoadRequest(str(path), device="cuda", dtype="float32")).interpreter
    model.open(2, 64)
    out = model.run([0, 1], IDS[:2], all_logits=True, record="logits")
    wanted = fresh(folder, "qwen3_moe", lanes=2).run([0, 1], IDS[:2], all_logits=True)
    assert np.abs(out.logits - wanted.logits).max() < 1e-3
    assert (out.expert_ids == wanted.expert_ids).all()
