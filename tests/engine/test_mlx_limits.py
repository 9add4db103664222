"""What the MLX interpreter refuses, and what it says of itself."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from moescope.engine.limits import honouring
from moescope.engine.mlx_limits import HONOURED, MLX, OPERATORS, WORDS, refuse_unsupported
from moescope.engine.operators import Attention
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from tests.engine.mlx_tiny import (
    IDS,
    fresh,
)
from tests.oracle.matrix import BY_FAMILY, spec_of
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


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
    narrow = honouring(OPERATORS, {Attention: fewer}, WORDS)
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
