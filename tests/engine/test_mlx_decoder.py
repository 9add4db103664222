"""The MLX interpreter beside torch's: the same tokens, experts and weights, lane by lane."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from moescope.engine import mlx_limits
from moescope.engine.decoder import Attention
from moescope.engine.interpreter import StepOutput
from moescope.engine.limits import Limits
from moescope.engine.mlx_decoder import MLXDecoder, compiles
from moescope.engine.mlx_limits import HONOURED, MLX, OPERATORS, WORDS, refuse_unsupported
from moescope.errors import MoescopeError
from moescope.kernels import route
from moescope.kernels.reference import gate_logits
from moescope.kernels.spec import RouterPolicy
from tests.engine.mlx_tiny import checkpoint_of, compiling_in, near_enough, on_mlx, on_torch
from tests.oracle.harness import difference, ours_greedy
from tests.oracle.matrix import BY_FAMILY, PROMPTS, spec_of
from tests.tiny import FAMILIES, VOCAB, tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 12))
# Families that no MLX operator runs yet.
NOT_YET: frozenset[str] = frozenset()
COMPARED = tuple(
    (case, prompt)
    for family in BY_FAMILY
    if family not in NOT_YET
    for case in BY_FAMILY[family][: None if family in FAMILIES else 1]
    for prompt in (PROMPTS if family in FAMILIES else list(PROMPTS)[1:])
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def fresh(folder: Path, family: str = "olmoe", lanes: int = 1, **options: Any) -> MLXDecoder:
    return on_mlx(tiny_checkpoint(family, folder), lanes=lanes, **options)


def same(a: StepOutput, b: StepOutput, lane_a: int, lane_b: int = 0, tolerance: float = 0) -> bool:
    """Whether two outputs say the same of two lanes, in every array."""
    return all(
        np.allclose(x[lane_a], getattr(b, name)[lane_b], rtol=0, atol=tolerance, equal_nan=True)
        for name in a.__dataclass_fields__
        if isinstance(x := getattr(a, name), np.ndarray)
    )


# --- beside torch -------------------------------------------------------------------------------


@cache
def _both(case: Any, folder: Path) -> tuple[Any, Any]:
    path = checkpoint_of(case, folder)
    return on_torch(path), on_mlx(path)


@pytest.mark.parametrize(
    ("case", "prompt"), COMPARED, ids=[f"{case.id}-{prompt}" for case, prompt in COMPARED]
)
def test_greedy_runs_are_those_of_torch(case: Any, prompt: str, folder: Path) -> None:
    torch_model, model = _both(case, folder)
    seen = difference(
        ours_greedy(torch_model, PROMPTS[prompt]), ours_greedy(model, PROMPTS[prompt])
    )
    assert near_enough(case.family, seen), seen


def test_families_that_do_not_run_are_refused() -> None:
    for family in NOT_YET:
        with pytest.raises(MoescopeError, match="not implemented by the MLX interpreter"):
            refuse_unsupported(spec_of(BY_FAMILY[family][0]))


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_that_of_torch(folder: Path, family: str, dtype: str) -> None:
    """As near as rounding in another order lets them be; weights are of the combine dtype."""
    path = tiny_checkpoint(family, folder, dtype=dtype)
    model = on_mlx(path, dtype=dtype)
    out = model.run([0], IDS[:1], all_logits=True, record="logits")
    wanted = on_torch(path, dtype=dtype).run([0], IDS[:1], all_logits=True, record="logits")
    exact = on_torch(tiny_checkpoint(family, folder)).run([0], IDS[:1], all_logits=True)
    off = np.abs(wanted.logits - exact.logits)  # what half precision costs torch
    assert np.median(np.abs(out.logits - wanted.logits)) < 1.5 * np.median(off)
    assert np.median(np.abs(out.logits - exact.logits)) < 1.5 * np.median(off)
    model.truncate(0, 0)
    steps = [model.run([0], IDS[:1, i : i + 1]).logits[0, 0] for i in range(12)]
    assert np.median(np.abs(np.stack(steps) - out.logits[0])) < 1.5 * np.median(off)
    assert out.weights is not None
    kept = out.weights.astype(np.float32).view(np.uint32)
    lost = kept & (0xFFFF if dtype == "bfloat16" else 0x1FFF)
    assert bool((lost == 0).all()) == (family != "mixtral")


# --- lanes --------------------------------------------------------------------------------------


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
    alone = fresh(folder, family)
    for place, lane in enumerate(order):
        alone.truncate(0, 0)
        alone.run([0], IDS[lane : lane + 1, : lengths[lane]])
        assert together.length(lane) == lengths[lane] + 1
        assert same(out, alone.run([0], token[place : place + 1], record="logits"), place, 0, 2e-5)


@pytest.mark.parametrize("lanes", [(0, 2), (1, 2), (3,), (2, 1)])
def test_any_lanes_may_be_fed_together(folder: Path, lanes: tuple[int, ...]) -> None:
    """Neighbours, some with others between, and in any order."""
    model, alone = fresh(folder, lanes=4), fresh(folder)
    model.run([0, 1, 2, 3], IDS)
    before = [model.run([lane], IDS[lane : lane + 1, :1]).logits for lane in range(4)]
    for lane in range(4):
        model.truncate(lane, 12)
    out = model.run(lanes, IDS[list(lanes), 5:6], record="logits")
    for place, lane in enumerate(lanes):
        alone.truncate(0, 0)
        alone.run([0], IDS[lane : lane + 1])
        wanted = alone.run([0], IDS[lane : lane + 1, 5:6], record="logits")
        assert same(out, wanted, place, 0, 2e-5)
    for lane in set(range(4)) - set(lanes):  # nobody else's cache was written to
        assert np.allclose(model.run([lane], IDS[lane : lane + 1, :1]).logits, before[lane])


def test_prefill_of_several_lanes_at_once(folder: Path) -> None:
    together = fresh(folder, lanes=4)
    out = together.run([0, 1, 2, 3], IDS, all_logits=True, record="logits")
    assert out.logits.shape == (4, 12, VOCAB) and out.expert_ids.shape == (4, 12, 4, 3)
    assert out.router_logits is not None and out.router_logits.shape == (4, 12, 4, 8)
    alone = fresh(folder)
    for lane in range(4):
        alone.truncate(0, 0)
        one = alone.run([0], IDS[lane : lane + 1], all_logits=True, record="logits")
        assert same(out, one, lane, 0, 2e-5)


def test_last_logits_only_and_records(folder: Path) -> None:
    model = fresh(folder)
    out = model.run([0], IDS[:1], record="ids")
    assert out.logits.shape == (1, 1, VOCAB)
    assert out.weights is None and out.scores is None and out.router_logits is None
    assert out.expert_ids.dtype == np.int16 and out.score_sum.dtype == np.float32
    model.truncate(0, 0)
    whole = model.run([0], IDS[:1], all_logits=True)
    assert np.allclose(whole.logits[:, -1:], out.logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lanes_that_do_the_same_get_the_same_bits(folder: Path, dtype: str) -> None:
    """Whatever their number and place, and whatever a lane beside them does: else two equal
    variants would part at the first near tie."""
    model = fresh(folder, "qwen2_moe", lanes=4, dtype=dtype)
    everyone = [0, 1, 2, 3]
    model.run(everyone, np.concatenate([IDS[:1].repeat(3, 0), IDS[1:2]]))
    other = [replace(r.spec.policy, num_experts_per_tok=2) for r in model.routers]
    model.set_policies(3, other)
    token = 7
    for _ in range(12):
        tokens = np.array([[token]] * 3 + [[token + 1]])
        out = model.run(everyone, tokens, record="logits")
        assert all(same(out, out, lane, 0) for lane in (1, 2))
        token = int(out.logits[0, 0].argmax()) % 255


def test_same_calls_give_the_same_bits(folder: Path) -> None:
    runs = [
        fresh(folder, "qwen2_moe").run([0], IDS[:1], all_logits=True, record="logits")
        for _ in range(2)
    ]
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
    model.copy(2, 2, 3)
    assert model.length(2) == 3


RECURRENT = ("qwen3_next", "kimi_linear", "jamba", "nemotron_h", "lfm2_moe")


@pytest.mark.parametrize("family", RECURRENT)
def test_state_that_is_rewritten_goes_back_too(folder: Path, family: str) -> None:
    """Lanes of different lengths beside each other, cut back into and before their last prompt, and
    forked, are as lanes that were never longer."""
    path = checkpoint_of(BY_FAMILY[family][0], folder)
    model, alone = on_mlx(path, lanes=3), on_mlx(path)
    model.run([0], IDS[:1, :8])
    model.run([1], IDS[1:2, :5])
    for at in range(8, 12):
        model.run([1, 0], IDS[[1, 0], at : at + 1])
    model.copy(0, 2, 10)
    model.truncate(0, 6)
    model.truncate(1, 0)
    model.run([1], IDS[2:3, :9])
    out = model.run([0, 1, 2], np.array([[7], [8], [9]]), record="logits")
    for lane, (ids, token) in enumerate(((IDS[0, :6], 7), (IDS[2, :9], 8), (IDS[0, :10], 9))):
        alone.truncate(0, 0)
        alone.run([0], ids[None])
        wanted = alone.run([0], np.array([[token]]), record="logits")
        assert same(out, wanted, lane, 0, 2e-4)
    model.open(4, 200)
    model.truncate(0, 6)
    again = model.run([0], np.array([[7]]), record="logits")
    assert same(again, out, 0, 0, 2e-4)


def test_what_is_fed_again_is_fed_under_the_policies_of_then(folder: Path) -> None:
    path = checkpoint_of(BY_FAMILY["qwen3_next"][0], folder)
    model, alone = on_mlx(path), on_mlx(path)
    trained = [router.spec.policy for router in model.routers]
    other = [replace(policy, num_experts_per_tok=1) for policy in trained]
    for one, length in ((model, 12), (alone, 9)):
        one.run([0], IDS[:1, :4])
        one.set_policies(0, other)
        for at in range(4, 8):
            one.run([0], IDS[:1, at : at + 1])
        one.set_policies(0, trained)
        for at in range(8, length):
            one.run([0], IDS[:1, at : at + 1])
    model.truncate(0, 9)
    wanted = alone.run([0], IDS[1:2, :1], record="logits")
    assert same(model.run([0], IDS[1:2, :1], record="logits"), wanted, 0, 0, 2e-4)


def test_growing_loses_nothing(folder: Path) -> None:
    model = fresh(folder)
    model.run([0], IDS[:1, :6])
    before = model.run([0], np.array([[9]]), record="logits")
    model.truncate(0, 6)
    model.open(3, 300)
    assert same(model.run([0], np.array([[9]]), record="logits"), before, 0, 0, 1e-6)
    model.open(1, 8)  # never shrinks
    model.run([2], IDS[:1])
    assert model.length(2) == 12


def test_what_a_step_looks_at_changes_nothing(folder: Path) -> None:
    """Past the first 128 positions a step sees more of the caches: tokens go on as in one call."""
    model = fresh(folder, room=256)
    ids = np.random.default_rng(5).integers(0, 256, (1, 140))
    wanted = model.run([0], ids, all_logits=True).logits[0]
    model.truncate(0, 0)
    model.run([0], ids[:, :120])
    for at in range(120, 140):
        found = model.run([0], ids[:, at : at + 1]).logits[0, 0]
        assert np.abs(found - wanted[at]).max() < 5e-5


def test_caches_are_written_to_where_they_lie(folder: Path) -> None:
    """A call needs less memory than a copy of one layer's keys would."""
    import mlx.core as mx

    model = fresh(folder, lanes=2, room=16384)
    one = model._states.held[0][0].nbytes
    for lanes, tokens in (([0], 1), ([0, 1], 1), ([1], 8)):
        for _ in range(2):  # of the first, some things are kept
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            model.run(lanes, IDS[: len(lanes), :tokens])
            taken = mx.get_peak_memory() - before
        assert taken < one, (lanes, tokens, taken, one)


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


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40])
def test_ids_outside_the_vocabulary_are_refused(folder: Path, wrong: int) -> None:
    model = fresh(folder)
    with pytest.raises(MoescopeError, match=f"token id {wrong}: expected 0..{VOCAB - 1}"):
        model.run([0], np.array([[1, wrong]]))
    assert model.length(0) == 0


def test_a_full_lane_is_refused(folder: Path) -> None:
    model = fresh(folder)
    room = model._capacity
    model.run([0], np.zeros((1, room), np.int64))
    with pytest.raises(MoescopeError, match=f"at most {room} tokens, {room + 1} are needed"):
        model.run([0], np.array([[1]]))
    assert model.length(0) == room


def test_policies_it_cannot_run_are_refused(folder: Path) -> None:
    model = fresh(folder)
    policies = [replace(r.spec.policy, num_experts_per_tok=9) for r in model.routers]
    with pytest.raises(MoescopeError, match=r"num_experts_per_tok: expected 1\.\.8, found 9"):
        model.set_policies(0, policies)
    policies = [replace(r.spec.policy, per_expert_scale=True) for r in model.routers]
    with pytest.raises(MoescopeError, match="per_expert_scale: this model has no tensor for it"):
        model.set_policies(0, policies)


def test_what_the_interpreter_does_not_do_is_refused_by_field(folder: Path) -> None:
    spec = fresh(folder).spec
    layer = spec.layers[0]
    attention = layer.branches[0].operator
    assert isinstance(attention, Attention)
    branch = replace(layer.branches[0], operator=replace(attention, shares_kv_of=0))
    wrong = replace(layer, branches=(branch, layer.branches[1]))
    with pytest.raises(
        MoescopeError, match=r"Attention\.shares_kv_of 0: not implemented by the MLX"
    ):
        refuse_unsupported(replace(spec, layers=(spec.layers[0], wrong, *spec.layers[2:])))


def test_what_a_spec_learns_to_say_is_not_passed_over(folder: Path) -> None:
    """Every class of a spec is known, every field honoured or refused, and every word too."""
    for operator in OPERATORS:
        assert operator in HONOURED
    for kind, text in HONOURED.items():
        hints = get_type_hints(kind)
        assert set(text.split()) <= set(hints), kind
        for name in text.split():
            words = get_args(hints[name])
            if words and all(isinstance(word, str) for word in words) and kind is not RouterPolicy:
                assert (kind, name) in WORDS, (kind, name)


def test_a_field_or_a_word_nobody_named_is_refused(folder: Path) -> None:
    clipped = spec_of(BY_FAMILY["olmoe"][1])
    fewer = HONOURED[Attention].replace("clip_qkv", "")
    assert MLX.first(clipped) is None
    narrow = Limits(OPERATORS, {Attention: mlx_limits._only(Attention, fewer)})
    assert narrow.first(clipped) == ("Attention.clip_qkv", 0.75)
    layer = clipped.layers[0]
    odd = replace(layer.branches[0], operator=replace(layer.branches[0].operator, gate="tanh"))
    wrong = replace(layer, branches=(odd, layer.branches[1]))
    assert MLX.first(replace(clipped, layers=(wrong,))) == ("Attention.gate", "tanh")


def test_another_thread_is_refused(folder: Path) -> None:
    model = fresh(folder)
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            model.run([0], IDS[:1])
        except AssertionError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "thread" in str(caught[0]) and model.length(0) == 0


# --- what it says of itself ---------------------------------------------------------------------


def test_nothing_of_mlx_leaves(folder: Path) -> None:
    model = fresh(folder, lanes=2)
    model.set_shadows([[r.spec.policy for r in model.routers]])
    for tokens in (1, 4):
        out = model.run([0, 1], IDS[:2, :tokens], record="logits")
        for name in out.__dataclass_fields__:
            value = getattr(out, name)
            assert value is None or isinstance(value, np.ndarray | int), name


def test_cache_bytes_are_what_open_allocates(folder: Path) -> None:
    model = fresh(folder, lanes=3)
    held = sum(array.nbytes for arrays in model._states.held for array in arrays)
    assert model.cache_bytes(3, model._capacity) == held


def test_kernels_say_what_runs(folder: Path) -> None:
    model = fresh(folder)
    assert set(model.kernels) == {"attention", "router", "experts", "step", "prompts"}
    assert model.kernels["step"].startswith("plain: ") and not model.compiled
    assert (model.device, model.draws) == ("mlx", False)
