"""Checkpoints that mlx-lm quantised: kept packed on MLX, and equal to their dequantised twins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine.load import inspect, load_model
from moescope.engine.mlx_decoder import MLXDecoder
from moescope.engine.mlx_operators import Above, Packed
from moescope.engine.protocol import LoadRequest
from tests.engine.layout_writers import as_mlx
from tests.engine.mlx_tiny import as_mlx_calls_gpt_oss, checkpoint_of, near_enough, on_mlx, on_torch
from tests.oracle.harness import agrees, difference, ours_greedy
from tests.oracle.matrix import BY_FAMILY, PROMPTS
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 12))
# widths that groups of 32 divide
SIZES = {"intermediate_size": 64, "moe_intermediate_size": 96}
USUAL = {"group_size": 32, "bits": 4, "mode": "affine"}
META = {"format": "mlx"}
Choose = Callable[[str, Any], bool | dict[str, Any]]


def mixed(path: str, module: Any) -> bool | dict[str, Any]:
    """As recipes of mixed precision: some modules wider, q, k, v unlike, some not at all."""
    if path.endswith(("v_proj", "layers.1.mlp.switch_mlp.up_proj")):
        return {"group_size": 64, "bits": 6, "mode": "affine"}
    if path.endswith("gate") or "layers.0.mlp.switch_mlp.down_proj" in path:
        return {"group_size": 32, "bits": 8, "mode": "affine"}
    return not path.endswith("o_proj")


def only_experts(path: str, module: Any) -> bool | dict[str, Any]:
    return "switch_mlp" in path


def quantised(source: Path, target: Path, how: dict[str, Any], choose: Choose | None) -> Path:
    """`source` as mlx-lm quantises it and writes it."""
    import mlx_lm.utils as mlx_lm

    model, config = mlx_lm.load_model(source)
    model, config = mlx_lm.quantize_model(
        model, config, how["group_size"], how["bits"], how["mode"], quant_predicate=choose
    )
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    mlx_lm.save_model(target, model)
    mlx_lm.save_config(config, target / "config.json")
    return target


def dequantised(source: Path, target: Path) -> Path:
    """The numbers that a quantised checkpoint stands for, as a checkpoint of float32."""
    import mlx.core as mx

    config = json.loads((source / "config.json").read_text())
    scheme = config.pop("quantization")
    config.pop("quantization_config")
    stored = mx.load(str(source / "model.safetensors"))
    whole: dict[str, mx.array] = {}
    for name, array in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith((".scales", ".biases")):
            continue
        if name.endswith(".weight") and f"{module}.scales" in stored:
            own = {**{k: v for k, v in scheme.items() if k in USUAL}, **(scheme.get(module) or {})}
            scales, biases = (stored.get(f"{module}.{kind}") for kind in ("scales", "biases"))
            if own["mode"] == "affine":
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            array = mx.dequantize(array, scales, biases, **own, dtype=mx.float32)
        whole[name] = array.astype(mx.float32)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), whole, META)
    return target


CASES: dict[str, tuple[str, dict[str, Any], Choose | None]] = {
    "olmoe": ("olmoe", USUAL, None),
    "qwen3_moe": ("qwen3_moe", USUAL, None),  # its routers in 8 bit
    "mixtral": ("mixtral", USUAL, None),
    "qwen2_moe": ("qwen2_moe", USUAL, None),
    "mixed": ("qwen3_moe", USUAL, mixed),
    "experts": ("olmoe", {**USUAL, "bits": 8}, only_experts),
    "bits 3": ("mixtral", {**USUAL, "bits": 3, "group_size": 64}, None),
    "mxfp4": ("mixtral", {**USUAL, "mode": "mxfp4"}, None),
    "mxfp8": ("olmoe", {**USUAL, "bits": 8, "mode": "mxfp8"}, None),
    "nvfp4": ("olmoe", {**USUAL, "group_size": 16, "mode": "nvfp4"}, None),
    "bfloat16": ("olmoe", USUAL, None),  # and so its scales
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By the name of a case: the packed checkpoint, and its twin."""
    made: dict[str, Pair] = {}
    root = tmp_path_factory.mktemp("packed")

    def of(name: str) -> Pair:
        if name not in made:
            family, how, choose = CASES[name]
            plain = tiny_checkpoint(
                family,
                root / f"{name} plain",
                layout="mlx",
                dialect="hub",
                **sizes(family),
                dtype="bfloat16" if name == "bfloat16" else "float32",
            )
            packed = quantised(plain, root / name, how, choose)
            made[name] = packed, dequantised(packed, root / f"{name} twin")
        return made[name]

    return of


def sizes(family: str) -> dict[str, Any]:
    more = {"shared_expert_intermediate_size": 64} if family == "qwen2_moe" else {}
    less = SIZES if family.startswith("qwen") else {"intermediate_size": 64}
    heads = {"head_dim": 32} if family == "qwen3_moe" else {}
    return {**less, **more, **heads}


@pytest.mark.parametrize("name", CASES)
def test_a_packed_checkpoint_is_its_dequantised_twin(
    name: str, pairs: Callable[[str], Pair]
) -> None:
    """The twin runs in torch: nothing but the numbers is shared."""
    packed, twin = pairs(name)
    model = on_mlx(packed)
    prompt = PROMPTS["longer-than-window"]
    seen = difference(ours_greedy(on_torch(twin), prompt), ours_greedy(model, prompt))
    assert agrees(seen), seen
    assert "gather_qmm" in model.kernels["experts"]


# Of every kind of operator, layout and router that mlx-lm publishes.
FURTHER = (
    "deepseek_v3",
    "gemma4_text",
    "gpt_oss",
    "jamba",
    "kimi_linear",
    "llama4_text",
    "longcat_flash",
    "nemotron_h",
    "qwen3_next",
)


def packed_by_hand(folder: Path) -> Path:
    """A checkpoint in mlx-lm's layout with every matrix packed that groups of 32 divide, routers in
    8 bit; as its quantiser writes it."""
    import mlx.core as mx

    scheme: dict[str, Any] = dict(USUAL)
    out: dict[str, mx.array] = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        fits = name.endswith(".weight") and array.ndim > 1 and array.shape[-1] % 32 == 0
        if not fits or "conv" in name or "norm" in name:
            out[name] = array
            continue
        if module.endswith((".gate", ".router", ".router.proj")):
            scheme[module] = {**USUAL, "bits": 8}
        bits = scheme.get(module, USUAL)["bits"]
        parts = mx.quantize(array.astype(mx.float32), 32, bits)
        kinds = ("weight", "scales", "biases")
        out |= {f"{module}.{kind}": part for kind, part in zip(kinds, parts, strict=True)}
    mx.save_safetensors(str(folder / "model.safetensors"), out, META)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def laid_out_by_mlx(family: str, folder: Path) -> Path:
    import mlx.core as mx

    case = BY_FAMILY[family][0]
    if family != "gpt_oss":
        return as_mlx(checkpoint_of(case, folder / "hub"), folder / "mlx")
    path = checkpoint_of(case, folder / "hub", layout="fused")
    shard = str(path / "model.safetensors")
    mx.save_safetensors(shard, as_mlx_calls_gpt_oss(mx.load(shard)), META)
    return path


@pytest.mark.parametrize("family", FURTHER)
def test_what_else_mlx_lm_publishes_is_its_dequantised_twin(family: str, tmp_path: Path) -> None:
    packed = packed_by_hand(laid_out_by_mlx(family, tmp_path))
    model, twin = on_mlx(packed), on_torch(dequantised(packed, tmp_path / "twin"))
    assert "gather_qmm" in model.kernels["experts"]
    prompt = PROMPTS["longer-than-window"]
    seen = difference(ours_greedy(twin, prompt), ours_greedy(model, prompt))
    assert near_enough(family, seen), seen


def test_what_is_packed_stays_so(pairs: Callable[[str], Pair]) -> None:
    model = on_mlx(pairs("mixed")[0])
    layer = model.forward.stages[1].branches
    attention, moe = (branching[1] for branching in layer)
    assert isinstance(attention, object) and isinstance(moe, object)
    found: Any = attention
    assert isinstance(found.qkv, Above)
    assert [(m.bits, m.group_size, m.shape[0]) for m in found.qkv.parts] == [
        (4, 32, 192),
        (6, 64, 64),
    ]
    assert not isinstance(found.out, Packed | Above)
    found = moe
    assert str(found.experts.gate_up) == "affine 4 bit and affine 6 bit"
    assert isinstance(found.experts.down, Packed) and found.router.gates[0].bits == 8
    assert isinstance(model.forward.embed, Packed)


@pytest.mark.parametrize("name", ["olmoe", "mixed", "mxfp4"])
def test_memory_is_what_is_held(name: str, pairs: Callable[[str], Pair]) -> None:
    """What `inspect` foresees, the arrays have; a fifth of what they stand for."""
    packed, twin = pairs(name)
    request = LoadRequest(str(packed), device="mlx", dtype="bfloat16")
    seen = inspect(request)
    seen.checkpoint.close()
    whole = inspect(LoadRequest(str(twin), device="mlx", dtype="float32"))
    whole.checkpoint.close()
    assert seen.memory["weights"] < 0.45 * whole.memory["weights"]
    model = load_model(request)
    assert model.memory["weights"] == seen.memory["weights"]


def test_lanes_and_chunks_of_a_packed_model(pairs: Callable[[str], Pair]) -> None:
    """Side by side, and fed a few at a time, as alone and at once."""
    model = on_mlx(pairs("mixed")[0], lanes=3)
    out = model.run([0, 1, 2], IDS[:3], all_logits=True)
    for lane in range(3):
        model.truncate(lane, 0)
    for at in range(12):
        step = model.run([0, 1, 2], IDS[:3, at : at + 1])
        assert np.abs(step.logits[:, 0] - out.logits[:, at]).max() < 1e-4


def test_half_precision_is_near(pairs: Callable[[str], Pair]) -> None:
    """Scales and activations in bfloat16, as these checkpoints are run."""
    packed, twin = pairs("bfloat16")
    wanted = on_torch(twin).run([0], IDS[:1], all_logits=True).logits
    model = on_mlx(packed, dtype="bfloat16")
    assert isinstance(model, MLXDecoder)
    off = np.abs(model.run([0], IDS[:1], all_logits=True).logits - wanted)
    plain = on_torch(twin, dtype="bfloat16").run([0], IDS[:1], all_logits=True).logits
    assert np.median(off) < 2 * np.median(np.abs(plain - wanted))


def test_scales_that_are_not_finite_are_noted(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    import mlx.core as mx

    folder = shutil.copytree(pairs("olmoe")[0], tmp_path / "broken")
    tensors = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.1.mlp.switch_mlp.down_proj.scales"
    broken = np.array(tensors[name])
    broken[2, 5, 1] = np.nan
    mx.save_safetensors(
        str(folder / "model.safetensors"), {**tensors, name: mx.array(broken)}, META
    )
    notes = load_model(LoadRequest(str(folder), device="mlx")).facts["notes"]
    assert [note for note in notes if "layer 1: mlp.experts.down holds 32 values" in note], notes


def test_gpt_oss_stays_packed_as_it_is_published(tmp_path: Path) -> None:
    """MXFP4 in blocks of bytes, rows of gate and up in turn: kept, and run as torch runs its
    numbers."""
    import mlx.core as mx

    folder = tiny_checkpoint(
        "gpt_oss", tmp_path, intermediate_size=64, hidden_size=64, dtype="bfloat16"
    )
    tensors = mx.load(str(folder / "model.safetensors"))
    published: dict[str, mx.array] = {}
    for name, array in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            published[name] = array
            continue
        codes, scales = mx.quantize(array.swapaxes(1, 2), mode="mxfp4")  # [E, rows, words]
        shape = (*scales.shape, 16)
        published[f"{name}_blocks"] = mx.contiguous(codes).view(mx.uint8).reshape(shape)
        published[f"{name}_scales"] = scales
    mx.save_safetensors(str(folder / "model.safetensors"), published, META)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    model = on_mlx(folder)
    experts: Any = model.forward.stages[0].branches[1][1]
    assert str(experts.experts.gate_up) == "mxfp4 4 bit" == str(experts.experts.down)
    prompt = PROMPTS["longer-than-window"]
    seen = difference(ours_greedy(on_torch(folder), prompt), ours_greedy(model, prompt))
    assert agrees(seen), seen
