"""Checkpoints with packed weights: every tensor of ours, as though they were not packed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.engine import load, quantised, torch_weights
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.protocol import LoadRequest
from moescope.engine.quantised import reading
from moescope.errors import MoescopeError
from tests.engine import packing
from tests.engine.packed_forms import FORMS, Form, made
from tests.engine.test_load import peak_and_weights
from tests.tiny import tiny_checkpoint

SHAPE = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], list[str], load.Inspected]:
    found = load.inspect(LoadRequest(str(folder), device="cpu", dtype="float32"))
    try:
        weights, notes = torch_weights.read(found, lambda event: None)
    finally:
        found.checkpoint.close()
    return weights, notes, found


def pack(folder: Path, form: Form, wanted: str = "proj.weight") -> dict[str, torch.Tensor]:
    """Replace every matrix whose name holds `wanted` by a packed one of random codes; returns all
    tensors as an unpacked checkpoint would have them."""
    path = folder / "model.safetensors"
    held, plain = load_file(path), {}
    for number, name in enumerate(sorted(held)):
        plain[name] = held[name]
        if wanted in name:
            tensors, values = form.make(np.random.default_rng(number), *held[name].shape)
            module = name.removesuffix(".weight")
            del held[name]
            held |= {f"{module}{suffix}": tensor for suffix, tensor in tensors.items()}
            plain[name] = values
    save_file(held, path)
    edit(folder, **{form.key: form.config})
    return plain


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", FORMS)
def test_a_packed_checkpoint_is_the_one_it_stands_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of ours, bit for bit; read and expanded in several pieces."""
    monkeypatch.setattr(reading, "READ", 4096)
    monkeypatch.setattr(reading, "EXPAND", 1000)
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **SHAPE)
    plain = pack(folder, FORMS[name])
    found, notes, inspected = read(folder)
    assert notes == [] and not inspected.plan.unexpected
    save_file(plain, folder / "model.safetensors")
    edit(folder, **{FORMS[name].key: None})
    expected, _, _ = read(folder)
    assert found.keys() == expected.keys()
    for target, tensor in expected.items():
        assert torch.equal(found[target], tensor), target


def test_reading_and_expanding_in_pieces_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, values = made(FORMS["fp8-ue8m0-32"], 150, 96)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        form = FORMS["fp8-ue8m0-32"]
        (held,) = quantised.held({form.key: form.config}, checkpoint.tensors).values()
        for read_at, expand_at in (
            (1 << 24, 1 << 20),
            (9000, 1 << 20),
            (1 << 24, 100),
            (9000, 100),
        ):
            monkeypatch.setattr(reading, "READ", read_at)
            monkeypatch.setattr(reading, "EXPAND", expand_at)
            counted: list[int] = []
            parts = list(reading.expanded(held.readings[0], checkpoint, None, counted.append))
            assert [part.start for part, _ in parts] == [0, *(p.stop for p, _ in parts[:-1])]
            assert len(parts) > 1 or read_at + expand_at > 1 << 24
            np.testing.assert_array_equal(np.concatenate([v for _, v in parts]), values.numpy())
            assert sum(counted) == sum(info.nbytes for info in checkpoint.tensors.values())


def stacked(folder: Path, form: Form, gate: Form) -> dict[str, torch.Tensor]:
    """An mlx-lm checkpoint with packed experts, and a router packed in a way of its own."""
    path = folder / "model.safetensors"
    held = load_file(path)
    plain = dict(held)
    for number, name in enumerate(sorted(held)):
        module = name.removesuffix(".weight")
        if "switch_mlp" in name:
            all_made = [
                form.make(np.random.default_rng([number, expert]), *matrix.shape)
                for expert, matrix in enumerate(held.pop(name))
            ]
            for suffix in all_made[0][0]:
                parts = [tensors[suffix] for tensors, _ in all_made]
                held[module + suffix] = torch.stack(parts)
            plain[name] = torch.stack([values for _, values in all_made])
        elif name.endswith(".gate.weight"):
            tensors, plain[name] = gate.make(np.random.default_rng(number), *held.pop(name).shape)
            held |= {module + suffix: tensor for suffix, tensor in tensors.items()}
    save_file(held, path)
    return plain


@pytest.mark.parametrize("listed", [True, False])
def test_mlx_checkpoints_with_paths_of_their_own(tmp_path: Path, listed: bool) -> None:
    """Routers of 8 bits in a model of 4, named in the config, or told by their shapes."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, layout="mlx", **SHAPE)
    plain = stacked(folder, FORMS["mlx-4-bit-g32"], FORMS["mlx-8-bit-g64"])
    quantization: dict[str, Any] = {"group_size": 32, "bits": 4}
    if listed:
        quantization["model.layers.0.mlp.gate"] = {"group_size": 64, "bits": 8}
        quantization["model.embed_tokens"] = False
        quantization["lm_head"] = False
    edit(folder, quantization=quantization, quantization_config=quantization)
    found, _, inspected = read(folder)
    packed = {
        placement.target: piece.packed
        for placement in inspected.plan.placements
        for piece in placement.pieces
    }
    gate, experts = packed["layers.0.mlp.gate.weight"], packed["layers.0.mlp.experts.down"]
    assert gate is not None and (gate.bits, gate.group_size) == (8, 64)
    assert experts is not None and (experts.bits, experts.group_size) == (4, 32)
    save_file(plain, folder / "model.safetensors")
    edit(folder, quantization=None, quantization_config=None)
    expected, _, _ = read(folder)
    assert all(torch.equal(found[target], tensor) for target, tensor in expected.items())


def test_what_modelopt_says_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Several algorithms in one checkpoint, of which config.json says nothing; if it does, it
    counts alone."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **SHAPE)
    plain = pack(folder, FORMS["nvfp4-modelopt"], "experts")
    queries = pack(folder, FORMS["fp8-modelopt"], "q_proj.weight").items()
    plain |= {name: tensor for name, tensor in queries if name.endswith("q_proj.weight")}
    edit(folder, quantization_config=None)
    layers = {
        "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    beside = folder / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    found, _, inspected = read(folder)
    assert any("made for FP8 activations" in note for note in inspected.notes())
    beside.write_text(json.dumps({"quantization": {**said, "quant_algo": "INT4_AWQ"}}))
    with pytest.raises(
        MoescopeError, match=r"hf_quant_config\.json: quantization\.quant_algo: exp"
    ):
        read(folder)
    edit(folder, quantization_config={"quant_method": "modelopt", **said})
    again, _, _ = read(folder)
    save_file(plain, folder / "model.safetensors")
    edit(folder, quantization_config=None)
    beside.write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    expected, _, _ = read(folder)
    for target, tensor in expected.items():
        assert torch.equal(found[target], tensor) and torch.equal(again[target], tensor), target


def test_scales_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """Of experts too: one scale is many values."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **SHAPE)
    pack(folder, FORMS["mxfp4-packed"])
    held = load_file(folder / "model.safetensors")
    for name in ("mlp.experts.1.down_proj", "self_attn.q_proj"):
        held[f"model.layers.0.{name}.weight_scale"][3, 1] = 255
    save_file(held, folder / "model.safetensors")
    assert read(folder)[1] == [
        "layer 0: attention.qkv.weight holds 32 values that are not finite",
        "layer 0: mlp.experts.down holds 32 values that are not finite",
    ]


@pytest.mark.parametrize("name", ["mlx-6-bit-g64", "fp8-ue8m0-32", "awq"])
@pytest.mark.parametrize("wanted", ["embed_tokens", "lm_head"])
def test_packed_tables_are_read_by_rows(
    name: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ", 5000)
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **SHAPE)
    plain = pack(folder, FORMS[name], wanted)
    edit(folder, quantization_config={**FORMS[name].config, "modules_to_not_convert": None})
    ours = {"embed_tokens": "embed.weight", "lm_head": "head.weight"}[wanted]
    (published,) = (tensor for name, tensor in plain.items() if wanted in name)
    assert torch.equal(read(folder)[0][ours], published)


@pytest.mark.parametrize(
    ("blocks", "scale"),
    [((128, 128), (-1, -1)), ((0, 0), (1, 1)), ((0, 0), ())],
    ids=["blocks", "one each", "one each, flat"],
)
def test_fused_experts_in_fp8(
    blocks: tuple[int, int], scale: tuple[int, ...], tmp_path: Path
) -> None:
    """All experts in one tensor, with scales of its own name: [E, .., ..], or one for each."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, layout="fused", **SHAPE)
    path = folder / "model.safetensors"
    plain = load_file(path)
    held = dict(plain)
    make = packing.fp8(*blocks, "_scale_inv")
    for number, name in enumerate(sorted(plain)):
        if "experts" not in name:
            continue
        made_ = [
            make(np.random.default_rng([number, expert]), *matrix.shape)
            for expert, matrix in enumerate(plain[name])
        ]
        held[name] = torch.stack([tensors[".weight"] for tensors, _ in made_])
        scales = torch.stack([tensors["_scale_inv"] for tensors, _ in made_])
        held[f"{name}_scale_inv"] = scales if blocks[0] else scales.reshape(len(made_), *scale)
        plain[name] = torch.stack([values for _, values in made_])
    save_file(plain, path)
    expected, _, _ = read(folder)
    save_file(held, path)
    sizes = {"weight_block_size": list(blocks)} if blocks[0] else {}
    edit(folder, quantization_config={"quant_method": "fp8", **sizes})
    found, notes, inspected = read(folder)
    assert notes == [] and inspected.plan.unused == ()
    assert all(torch.equal(found[target], tensor) for target, tensor in expected.items())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_expanding_holds_little_more_than_the_weights(tmp_path: Path) -> None:
    """At most 1.1 × what the expanded weights take, measured in a process of its own."""
    wide = {**SHAPE, "hidden_size": 256, "moe_intermediate_size": 256}
    small = tiny_checkpoint("qwen3_moe", tmp_path / "small", layout="mlx", **SHAPE)
    large = tiny_checkpoint(
        "qwen3_moe",
        tmp_path / "large",
        layout="mlx",
        **{**wide, "num_hidden_layers": 8, "num_experts": 16},
    )
    held = load_file(large / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in held if "switch_mlp" in name]:
        experts, rows, columns = held.pop(name).shape
        module = name.removesuffix(".weight")
        words = torch.randint(
            -(2**31), 2**31 - 1, (experts, rows, columns // 8), generator=generator
        )
        held[name] = words.to(torch.int32).view(torch.uint32)
        for role in ("scales", "biases"):
            held[f"{module}.{role}"] = torch.full((experts, rows, columns // 32), 0.01)
    save_file(held, large / "model.safetensors")
    edit(large, quantization={"group_size": 32, "bits": 4})
    grown, weights = peak_and_weights(small, large, "float32")
    assert weights > 90e6
    assert grown <= 1.1 * weights, (grown, weights)
