"""The MLX interpreter beside torch's: the same tokens, experts and weights, lane by lane."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine.mlx_limits import refuse_unsupported
from moescope.errors import MoescopeError
from tests.engine.mlx_tiny import (
    IDS,
    checkpoint_of,
    fresh,
    near_enough,
    on_mlx,
    on_torch,
    same,
)
from tests.oracle.harness import difference, ours_greedy
from tests.oracle.matrix import BY_FAMILY, PROMPTS, spec_of
from tests.tiny import FAMILIES, VOCAB, tiny_checkpoint

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
