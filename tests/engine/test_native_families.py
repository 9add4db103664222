"""Every family's decode step in C against the torch operators: tokens, experts, weights, logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine.decoder import DecoderSpec, Layer
from moescope.engine.operators import MLA, RopeScaling
from moescope.engine.torch_decoder import TorchDecoder
from moescope.kernels import native_ops as native
from moescope.kernels.spec import RouterPolicy
from tests.engine.native_cases import agree, pair, spec_in, walk
from tests.families.kit import Case
from tests.oracle.matrix import BY_FAMILY, BY_ID

IDS = np.random.default_rng(3).integers(0, 250, (4, 40))
FIRST = tuple(cases[0].id for cases in BY_FAMILY.values())
# Families that differ most in what they are made of; a normal run has these, and one case of each.
APART = (
    *("axk2", "beam", "cohere2_moe", "deepseek_v3", "flint", "gemma4_text", "gpt_oss", "jetmoe"),
    *("lfm2_moe", "llama4_text", "longcat_flash", "mimo_v2_flash", "minimax_m2", "nemotron_h"),
    *("phimoe", "qwen3_next", "zaya"),
)
# What runs in torch beside the C program; of all other families nothing does.
BESIDE = {
    "axk2": "MLA",  # with an indexer
    "bailing_hybrid": "LinearAttention",
    "deepseek_v32": "MLA",
    "glm_moe_dsa": "MLA",
    "granitemoehybrid": "StateSpace",
    "jamba": "StateSpace",
    "jetmoe": "RoutedAttention",
    "kimi_linear": "LinearAttention",
    "lfm2_moe": "ShortConv",
    "nemotron_h": "StateSpace",
    "qwen3_5_moe_text": "LinearAttention",
    "qwen3_next": "LinearAttention",
    "zaya": "ConvolvedAttention, MoE",  # with a network before its gate
}


def among(cases: Iterable[str], usual: Iterable[str]) -> list[Any]:
    """Cases as parameters; those that are not usual are for `make conformance`."""
    usual = set(usual)
    marks = {True: (), False: (pytest.mark.conformance,)}
    return [pytest.param(case, marks=marks[case in usual]) for case in cases]


pytestmark = pytest.mark.skipif(native.library() is None, reason="no C library, no compiler")


def changed(policy: RouterPolicy, number: int) -> RouterPolicy:
    """Something else to route by, whatever the family."""
    edits: dict[str, Any] = {"routed_scaling_factor": 1.75}
    if policy.scoring_func != "sparsemixer":
        edits["num_experts_per_tok"] = 1 + number % 2
    if number % 2:
        edits["gate_quant_bits"] = 4
    return replace(policy, **edits)


def policies(model: TorchDecoder, number: int) -> list[RouterPolicy]:
    return [changed(router.spec.policy, number) for router in model.routers]


@pytest.mark.parametrize("case", among(BY_ID, FIRST))
def test_decoding_is_that_of_the_torch_operators(case: str) -> None:
    """After prompts of several lengths, under policies of their own, with a shadow, forked and cut
    back; at every level of recording."""
    found = BY_ID[case]
    models = pair(spec_in(found, "float32"), lanes=3)
    step = models[1].step
    assert step is not None
    assert step.kernels["step"].partition("in torch: ")[2] == BESIDE.get(found.family, "")
    for model in models:
        for lane, length in enumerate((3, 20, 1)):
            model.run([lane], IDS[lane : lane + 1, :length])
    walk(models, [2, 0, 1], 2)
    for model in models:
        model.set_policies(1, policies(model, 0))
        model.set_shadows([policies(model, 1)])
    walk(models, [0, 1], 2, "weights")
    for model in models:
        model.copy(1, 2, 17)
        model.truncate(0, 2)
    walk(models, [2, 0, 1], 2, "logits")
    for model in models:
        model.set_shadows([])
    walk(models, [2], 2, "ids")


@pytest.mark.parametrize("case", among(FIRST, [BY_FAMILY[name][0].id for name in APART]))
def test_rounding_is_that_of_the_torch_operators(case: str) -> None:
    """Each kind of layer alone, in bfloat16: one rounding more or less would move most of the
    first token's logits. Later ones mix values, in sums that end in other bits here and there."""
    spec = spec_in(BY_ID[case], "bfloat16")
    for layers in _kinds(spec):
        models = pair(replace(spec, layers=layers), "bfloat16", capacity=16)
        for position in range(3):
            token = IDS[:1, position : position + 1]
            a, b = (model.run([0], token).logits for model in models)
            if position == 0:
                assert (a == b).mean() > 0.9, layers
            assert np.abs(a - b).max() < 0.03 * np.abs(a).max()


def _kinds(spec: DecoderSpec) -> Iterator[tuple[Layer, ...]]:
    """Decoders of one kind of layer; of two, where it has no router or waits for a tap."""
    if spec.carried:
        yield spec.layers[:2]
        return
    routed = next(layer for layer in spec.layers if replace(spec, layers=(layer,)).routers())
    for layer in dict.fromkeys(spec.layers):
        alone = replace(spec, layers=(layer,)).routers()
        yield (layer,) if alone else (layer, routed)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(
    "case", ["gpt_oss-released", "deepseek_v3-groups", "gemma4_text-released", "nemotron_h-latent"]
)
def test_every_instruction_set(case: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_ISA", isa)
    models = pair(spec_in(BY_ID[case], "float32"), lanes=2, threads=3)
    walk(models, [1, 0], 4)


@pytest.mark.parametrize("case", ["gpt_oss-full-first", "deepseek_v3-groups", "flint-released"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_in_several_blocks(case: str, dtype: str) -> None:
    """Sinks, softcaps and latent rows around the size of a block, and beyond it. In bfloat16 what C
    rounds otherwise there must be no further from exact numbers than what torch rounds."""
    ids = np.random.default_rng(8).integers(0, 250, (1, 530))
    spec = spec_in(BY_ID[case], dtype)
    models = pair(spec, dtype, lanes=3, capacity=540)
    if dtype != "float32":
        wide = {name: tensor.float() for name, tensor in models[0].shared.weights.items()}
        exact = spec_in(BY_ID[case], "float32")
        models.insert(0, TorchDecoder(exact, wide, device="cpu", dtype="float32", fused=False))
        models[0].open(3, 540)
    for model in models:
        for lane, length in enumerate((254, 511, 530)):
            model.run([lane], ids[:, :length], together=True)
    if dtype == "float32":
        walk(models, [0, 1, 2], 4)
        return
    tokens = [ids[:, i : i + 3].T for i in range(8)]
    outs = [np.stack([model.run([0, 1, 2], token).logits for token in tokens]) for model in models]
    # medians of rows: a choice within rounding now and then moves one of them much further
    of_torch, own = (np.median(np.abs(out - outs[0]).mean(-1)) for out in outs[1:])
    assert own < 1.15 * of_torch


def test_frequencies_of_long_lanes_begin_where_they_do_in_torch() -> None:
    """Longrope: lanes on both sides of the original context, and over it."""
    spec = spec_in(BY_ID["phimoe-long-window"], "float32")
    scaling = next(b.operator.rope.scaling for _, b in spec.operators())  # type: ignore[union-attr]
    assert isinstance(scaling, RopeScaling) and scaling.kind == "longrope"
    context = scaling.original_context
    ids = np.random.default_rng(2).integers(0, 250, (1, context + 4))
    models = pair(spec, lanes=3, capacity=context + 16)
    for model in models:
        for lane, length in enumerate((4, context - 2, context + 4)):
            model.run([lane], ids[:, :length])
    walk(models, [0, 1, 2], 6)


def test_a_router_in_torch_is_recorded_like_one_in_c() -> None:
    """Also where its logits are no numbers, and the first router that met such is named."""
    models = pair(spec_in(BY_ID["jetmoe-released"], "float32"), lanes=2)
    gate = models[0].shared.weights["layers.1.attention.gate.weight"]
    kept = gate.clone()
    gate[2, 3] = float("nan")
    try:
        outs = [model.run([0, 1], IDS[:2, :1], record="logits") for model in models]
    finally:
        gate.copy_(kept)
    assert outs[0].invalid_router == 2
    agree(*outs)
    assert outs[1].kept is not None
    for name, values in outs[1].kept.fields().items():
        wanted = getattr(outs[0], name)
        assert np.allclose(values, wanted, atol=2e-5, equal_nan=True), name


def test_recurrent_state_is_cut_back_with_the_caches() -> None:
    """To positions on both sides of a snapshot, then on with the step."""
    models = pair(spec_in(BY_ID["qwen3_next-released"], "float32"), lanes=2, capacity=128)
    for model in models:
        model.run([0], np.tile(IDS[:1], 2))
        model.run([1], IDS[1:2, :4])
    walk(models, [0, 1], 3)
    for length in (78, 40, 3):
        for model in models:
            model.truncate(0, length)
            model.copy(0, 1, length - 1)
        walk(models, [1, 0], 2)


def test_lanes_that_do_the_same_get_the_same_bits() -> None:
    """Of operators that run in torch between those in C as well."""
    for case in ("deepseek_v3-groups", "gpt_oss-released", "jamba-released"):
        for dtype in ("float32", "bfloat16"):
            _, model = pair(spec_in(BY_ID[case], dtype), dtype, lanes=4)
            for lane in range(4):
                model.run([lane], IDS[:1, :6])
            for _ in range(3):
                out = model.run([3, 0, 1, 2], np.full((4, 1), 9))
                assert (out.logits == out.logits[:1]).all(), (case, dtype)


def test_what_a_spec_asks_for_beyond_the_program_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator with more than C does, others without."""
    case: Case = BY_ID["deepseek_v3-groups"]
    spec = spec_in(case, "float32")
    from moescope.engine import native_limits

    narrow = {kind: dict(only) for kind, only in native_limits.NATIVE.only.items()}
    narrow[MLA]["q_lora_rank"] = ()
    limits = replace(native_limits.NATIVE, only=narrow)
    monkeypatch.setattr(native_limits, "NATIVE", limits)
    models = pair(spec, lanes=2)
    assert models[1].step is not None
    assert models[1].step.kernels["step"].endswith("; in torch: MLA")
    assert models[1].step.kernels["attention"] == "torch"
    walk(models, [0, 1], 3)


def test_a_program_is_freed_with_its_decoder() -> None:
    """What a decoder lends its step does not hold the decoder."""
    import weakref

    _, model = pair(spec_in(BY_ID["jamba-released"], "float32"))
    model.run([0], IDS[:1, :1])
    seen = weakref.ref(model)
    del model, _
    assert seen() is None
    assert torch.is_inference_mode_enabled() is False
