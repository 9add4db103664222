"""Convolved attention, networks before gates and learned sums: lanes, forced routers, limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine import families, rewind
from moescope.engine.decoder import DecoderSpec, state_bytes
from moescope.engine.layer_words import layer_words
from moescope.engine.operators import ConvolvedAttention, GateNetwork, MoE, Norm
from moescope.engine.torch_decoder import TorchDecoder
from moescope.errors import MoescopeError
from moescope.kernels.spec import Routing
from tests.engine.mlx_tiny import near_enough, on_mlx
from tests.families import PUBLISHED
from tests.families.kit import on_moe, on_operators
from tests.oracle import harness
from tests.oracle.checks import in_bfloat16
from tests.oracle.matrix import BY_FAMILY, PROMPTS, spec_of

PLAIN, BIASED = BY_FAMILY["zaya"]
SKIPPED = 8  # the class after the experts
IDS = np.random.default_rng(11).integers(0, 256, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convolved")


@pytest.fixture(scope="module")
def biased(folder: Path) -> TorchDecoder:
    """Kernels of three and four tokens; its first token's value is in part a bias."""
    model = harness.load(harness.write(BIASED, folder))
    model.open(3, 64)
    return model


# --- lanes ----------------------------------------------------------------------------------------


def _fed(model: Any, lane: int, length: int) -> None:
    """A prompt of seven tokens, then one by one."""
    model.truncate(lane, 0)
    if length:
        model.run([lane], IDS[None, : min(7, length)])
    for at in range(7, length):
        model.run([lane], IDS[None, at : at + 1])


@pytest.mark.parametrize("device", ["cpu", "mlx"])
def test_a_lane_cut_or_forked_anywhere_has_the_tail_that_it_had_there(
    biased: TorchDecoder, device: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewind, "EVERY", 5)
    monkeypatch.setattr(rewind, "AT_ONCE", 3)
    model: Any = biased if device == "cpu" else on_mlx(harness.write(BIASED, folder), lanes=3)
    for at in (0, 1, 2, 5, 8, 13, 19, 20) if device == "cpu" else (1, 8, 20):
        _fed(model, 0, at)
        wanted = model.run([0], IDS[None, at : at + 1]).logits
        _fed(model, 1, 20)
        model.copy(1, 2, at)
        model.truncate(1, at)
        for lane in (1, 2):
            found = model.run([lane], IDS[None, at : at + 1]).logits
            assert np.abs(found - wanted).max() < 1e-5, (lane, at)


def test_lanes_decoded_together_are_lanes_alone(biased: TorchDecoder) -> None:
    alone = []
    for length in (0, 3, 9):
        _fed(biased, 0, length)
        alone.append(biased.run([0], IDS[None, 20:21]).logits[0])
    for lane, length in enumerate((0, 3, 9)):
        _fed(biased, lane, length)
    together = biased.run([2, 0, 1], np.full((3, 1), IDS[20]))
    for place, lane in enumerate((2, 0, 1)):
        assert np.abs(together.logits[place] - alone[lane]).max() < 1e-5


def test_bytes_of_a_lane_are_those_that_are_held(biased: TorchDecoder) -> None:
    held = sum(
        tensor.nbytes
        for _, _, run in biased.operators()
        for name in ("keys", "values", "window", "matrix")
        if (tensor := getattr(run, name, None)) is not None
    )
    lanes, capacity = biased.shared.lanes, biased.shared.capacity
    assert held == biased.cache_bytes(lanes, capacity)
    assert held == lanes * state_bytes(biased.spec, capacity, 4)


def test_on_mlx_it_runs_as_on_torch(biased: TorchDecoder, folder: Path) -> None:
    model: Any = on_mlx(harness.write(BIASED, folder))
    found = harness.ours_greedy(model, PROMPTS["longer-than-window"])
    wanted = harness.ours_greedy(biased, PROMPTS["longer-than-window"])
    assert near_enough("zaya", harness.difference(wanted, found))


# --- routers that are forced ----------------------------------------------------------------------


@pytest.mark.parametrize("expert", [0, 5, SKIPPED])
def test_a_forced_router_hands_on_its_state_all_the_same(expert: int, folder: Path) -> None:
    """As transformers does where every router's choice is replaced after it was made."""
    model, theirs = harness.load(harness.write(PLAIN, folder)), harness.model_of(PLAIN)
    skips = expert == SKIPPED

    def chosen(module: Any, inputs: Any, output: Any) -> Any:
        logits, _, ids, state = output
        weight = torch.softmax(logits, -1)[:, expert : expert + 1]
        forced = torch.full_like(ids, 0 if skips else expert)
        return logits, weight * (not skips), forced, state

    def forced(router: Any, x: Any, routing: Routing, call: Any) -> Routing:
        weight = torch.softmax(routing.logits, -1)[:, expert : expert + 1]
        ids = torch.full_like(routing.expert_ids, expert)
        return replace(routing, expert_ids=ids, weights=weight * (not skips))

    hooks = [layer.mlp.gate.register_forward_hook(chosen) for layer in theirs.model.layers]
    try:
        with torch.no_grad():
            wanted = theirs(torch.as_tensor(IDS)[None]).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    model.set_intervention(forced)
    out = model.run([0], IDS[None], all_logits=True)
    assert (out.expert_ids == expert).all()
    assert np.abs(out.logits[0] - wanted).max() < harness.LOGITS


# --- what a bfloat16 model keeps in float32 -------------------------------------------------------


def test_the_residual_of_a_bfloat16_model_is_not_rounded(folder: Path) -> None:
    model = harness.load(harness.write(PLAIN, folder, dtype="bfloat16"), "bfloat16")
    theirs = in_bfloat16(harness.model_of(PLAIN), "sdpa")
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(IDS)[None]).logits[0].float().numpy()
    rounded = TorchDecoder(
        replace(model.spec, residual_dtype="model"),
        model.shared.weights,
        device="cpu",
        dtype="bfloat16",
    )
    off = []
    for run in (model, rounded):
        run.open(1, 32)
        off.append(float(np.abs(run.run([0], IDS[None], all_logits=True).logits - wanted).mean()))
    assert off[0] < 0.5 * off[1], off


# --- single tokens, and what is no decoder --------------------------------------------------------

NETWORK = GateNetwork(24, Norm(24), 2, "gelu", writes="state")


def test_single_tokens_are_as_the_torch_operators_have_them(biased: TorchDecoder) -> None:
    """Whatever part of them a step of the CPU takes."""
    plain = TorchDecoder(
        biased.spec, biased.shared.weights, device="cpu", dtype="float32", fused=False
    )
    plain.open(1, 64)
    wanted = harness.ours_greedy(plain, PROMPTS["longer-than-window"])
    found = harness.ours_greedy(biased, PROMPTS["longer-than-window"])
    seen = harness.difference(wanted, found)
    assert plain.step is None and harness.agrees(seen), seen


def _reads(name: str) -> Callable[[DecoderSpec], DecoderSpec]:
    return on_moe(lambda moe: replace(moe, gate_network=replace(moe.gate_network, reads=name)))


def _writes(name: str) -> Callable[[DecoderSpec], DecoderSpec]:
    return on_moe(lambda moe: replace(moe, gate_network=replace(moe.gate_network, writes=name)))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_reads("router_state"), "layer 0 branch 'mlp': its gate reads 'router_state'"),
        (_writes("elsewhere"), "its gate writes 'elsewhere', no tap of its own"),
        (_writes("residual"), "its gate writes 'residual', no tap of its own"),
        (on_moe(lambda moe: replace(moe, gate_network=None)), "without a gate_network"),
        (
            on_operators(MoE, lambda m: replace(m, gate_network=replace(NETWORK, width=20))),
            "norm of width 24 in the gate_network",
        ),
        (
            on_operators(ConvolvedAttention, lambda a: replace(a, kv_heads=3)),
            "4 heads do not divide over 3",
        ),
    ],
)
def test_wiring_that_means_nothing_is_no_spec(
    edit: Callable[[DecoderSpec], DecoderSpec], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        edit(spec_of(PLAIN))


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"zaya_use_eda": True}, "zaya_use_eda: expected no such key"),
        ({"moe_router_topk": 1}, "moe_router_topk: expected no such key"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok: expected an integer 1..1"),
        ({"layer_types": ["hybrid_sliding"] * 40}, "sliding_window"),
        ({"layer_types": ["hybrid_sliding"] * 40, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 40}, "layer_types"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_parameters: expected an object with hyb"),
        ({"num_attention_heads": 7}, "num_key_value_heads: expected a divisor"),
        ({"cca_time1": 0}, "cca_time1"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_configs_that_are_of_something_else_are_refused(edits: dict[str, Any], says: str) -> None:
    with pytest.raises(MoescopeError, match=says):
        families.build({**PUBLISHED["zaya"], **edits})


def test_a_convolution_of_other_channels_is_told_by_its_rows(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = harness.write(PLAIN, tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.conv_qk_grouped.weight"
    for shape, says in (((95, 16, 2), "95 rows"), ((96, 16, 3), "3 taps"), ((96, 16), "3 dim")):
        wrong = {**tensors, name: torch.zeros(shape)}
        save_file(wrong, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MoescopeError, match=says):
            harness.load(path)


def test_a_published_config_in_words() -> None:
    spec = families.build(PUBLISHED["zaya"])
    assert layer_words(spec.layers[3]) == (
        "convolved attention 8×128, kv 2",
        "1 of 16 experts × 2048, gate by 3 layers of 256, 1 skip",
    )
    silent = dict(PUBLISHED["zaya"])
    for name in ("rope_parameters", "cca_time0", "head_dim", "tie_word_embeddings"):
        del silent[name]
    assert families.build(silent) == spec


def test_float32_convolutions_are_never_of_fewer_bits(
    biased: TorchDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's usual way, on a device that has it, is TF32; what others chose comes back after."""
    allowed: list[bool] = []
    conv1d = torch.nn.functional.conv1d

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return conv1d(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "conv1d", watched)
    before = torch.backends.cudnn.allow_tf32
    biased.open(1, 32)
    biased.truncate(0, 0)
    biased.run([0], IDS[None, :8])
    assert allowed and not any(allowed)
    assert torch.backends.cudnn.allow_tf32 == before
