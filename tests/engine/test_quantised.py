"""Quantised weights: every format against loops over its definition, and against mlx."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moescope.engine import load, quantised
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.header import TensorInfo
from moescope.engine.protocol import LoadRequest
from moescope.engine.quantised import numbers, reading
from moescope.engine.quantised.formats import FORMATS
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from tests.engine import packing
from tests.engine.packing import FORMS, Form
from tests.tiny import tiny_checkpoint

_NAMES = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "bfloat16": "BF16"}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """As the header of a file would have them."""
    found = {}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        short = kind.replace("uint", "U").replace("int", "I").replace("float", "F")
        dtype = _NAMES.get(kind, short)
        found[name] = TensorInfo(name, dtype, tuple(tensor.shape), 0, "x.safetensors", 0)
    return found


def made(form: Form, rows: int, columns: int, seed: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """The tensors of module `m`, and their numbers."""
    tensors, values = form.make(np.random.default_rng(seed), rows, columns)
    return {f"m{suffix}": tensor for suffix, tensor in tensors.items()}, values


def expanded(form: Form, tensors: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    held = quantised.held({form.key: form.config}, infos(tensors))
    assert len(held) == 1, sorted(held)
    (packed,) = (entry.readings[0] for entry in held.values())
    assert packed.format == form.format
    arrays = {
        role: numbers.decode(
            infos(tensors)[name].dtype,
            tensors[name].contiguous().view(torch.uint8).numpy().tobytes(),
            tuple(tensors[name].shape),
        )
        for role, name in packed.tensors
        if FORMATS[packed.format].roles[role].read
    }
    return quantised.expand(packed, arrays)


def test_every_format_is_made_here() -> None:
    assert {form.format for form in FORMS.values()} | {"MXFP4"} == set(FORMATS)


@pytest.mark.parametrize(
    ("table", "value"),
    [
        (numbers.E2M1, packing.e2m1),
        (numbers.E4M3, packing.e4m3),
        (numbers.E5M2, packing.e5m2),
        (numbers.E8M0, packing.e8m0),
    ],
)
def test_small_floats_by_definition(table: Any, value: Any) -> None:
    expected = [np.float32(value(code)) for code in range(len(table))]
    np.testing.assert_array_equal(table, expected)
    signs = [math.copysign(1, x) for x in expected if not math.isnan(x)]
    assert [math.copysign(1, x) for x in table if not math.isnan(x)] == signs


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_small_floats_as_torch_has_them(dtype: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    short = {"float8_e5m2": "F8_E5M2", **_NAMES}[dtype]
    found = numbers.decode(short, bits.numpy().tobytes(), (256,))
    np.testing.assert_array_equal(found, bits.view(getattr(torch, dtype)).float().numpy())


def test_halves_as_torch_has_them() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for dtype, short in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        found = numbers.decode(short, bits.numpy().tobytes(), (1 << 16,))
        np.testing.assert_array_equal(found, bits.view(dtype).float().numpy())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.data())
def test_codes_in_a_row_and_by_word(bits: int, rows: int, groups: int, data: st.DataObject) -> None:
    line = st.lists(st.integers(0, (1 << bits) - 1), min_size=32 * groups, max_size=32 * groups)
    codes = data.draw(st.lists(line, min_size=rows, max_size=rows))
    dense = np.array([packing.in_words(row, bits) for row in codes], np.uint32)
    np.testing.assert_array_equal(numbers.codes(dense, bits), codes)
    loose = np.array([packing.per_word(row, bits) for row in codes], np.uint32)
    np.testing.assert_array_equal(numbers.fields(loose, bits)[:, : 32 * groups], codes)


@pytest.mark.parametrize("name", FORMS)
def test_numbers_by_definition(name: str) -> None:
    form = FORMS[name]
    for seed, (rows, columns) in enumerate([(32, 64), (64, 192)]):
        tensors, values = made(form, rows, columns, seed)
        found = expanded(form, tensors)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.numpy())


def test_blocks_that_the_edges_cut() -> None:
    for name, shape in (("fp8-128", (200, 150)), ("fp8-ue8m0-32", (33, 70))):
        tensors, values = made(FORMS[name], *shape)
        np.testing.assert_array_equal(expanded(FORMS[name], tensors), values.numpy())


def test_gpt_oss() -> None:
    tensors, values = packing.gpt_oss(np.random.default_rng(1), 24, 96)
    stacked = {f"e.down_proj{s}": torch.stack([t, t.flip(0)]) for s, t in tensors.items()}
    held = quantised.held({"quantization_config": {"quant_method": "mxfp4"}}, infos(stacked))
    packed = held["e.down_proj"].readings[0]
    assert packed.shape == (2, 24, 96) and (packed.bits, packed.group_size) == (4, 32)
    arrays = {role: stacked[name].numpy() for role, name in packed.tensors}
    found = quantised.expand(packed, arrays)
    np.testing.assert_array_equal(found, torch.stack([values, values.flip(0)]).numpy())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 2))
def test_any_numbers_of_any_size(name: str, seed: int, rows: int, groups: int) -> None:
    form = FORMS[name]
    tensors, values = made(form, 32 * rows, 64 * groups, seed)
    np.testing.assert_array_equal(expanded(form, tensors), values.numpy())


# --- mlx ------------------------------------------------------------------------------------------


def _from_mlx(mode: str, bits: int, group: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    mx.random.seed(7)
    weight = mx.random.normal((2, 24, 256)).astype(getattr(mx, dtype))
    packed = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    names = ("weight", "scales", "biases")[: len(packed)]
    target = {"dtype": mx.float32} if mode != "affine" else {}
    expected = mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, **target)
    arrays = {
        name: np.array(array.astype(mx.float32) if "float" in str(array.dtype) else array)
        for name, array in zip(names, packed, strict=True)
    }
    whole = quantised.Packed(f"mlx {mode}", (), (2, 24, 256), bits, group)
    found = quantised.expand(whole, arrays)
    rounded = mx.array(found).astype(expected.dtype)
    apart = mx.abs(rounded.astype(mx.float32) - expected.astype(mx.float32)).max().item()
    scale = np.abs(found).max()
    # mlx multiplies and adds in the dtype of the scales; here both are done in float32
    assert apart <= (0 if dtype == "float32" else 2**-7) * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_as_mlx_has_it(bits: int, group: int, dtype: str) -> None:
    _from_mlx("affine", bits, group, dtype)


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_floats_as_mlx_has_them(mode: str, bits: int, group: int) -> None:
    _from_mlx(mode, bits, group, "float32")


def test_a_global_scale_as_mlx_has_it() -> None:
    mx = pytest.importorskip("mlx.core")
    mx.random.seed(3)
    weight = mx.random.normal((16, 64))
    whole = mx.abs(weight).max()
    words, scales = mx.quantize(weight, mode="nvfp4", global_scale=whole)
    expected = mx.dequantize(words, scales, mode="nvfp4", global_scale=whole, dtype=mx.float32)
    packed = quantised.Packed("mlx nvfp4", (), (16, 64), 4, 16)
    arrays = {
        "weight": np.array(words),
        "scales": np.array(scales),
        "global_scale": np.array(whole),
    }
    np.testing.assert_allclose(quantised.expand(packed, arrays), np.array(expected), rtol=1e-6)


# --- whole checkpoints ----------------------------------------------------------------------------

_SHAPE = {
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
        weights, notes = load._read(found, lambda event: None)
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
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **_SHAPE)
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
    folder = tiny_checkpoint("qwen3_moe", tmp_path, layout="mlx", **_SHAPE)
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


def test_scales_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """Of experts too: one scale is many values."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, **_SHAPE)
    pack(folder, FORMS["mxfp4-packed"])
    held = load_file(folder / "model.safetensors")
    for name in ("mlp.experts.1.down_proj", "self_attn.q_proj"):
        held[f"model.layers.0.{name}.weight_scale"][3, 1] = 255
    save_file(held, folder / "model.safetensors")
    assert read(folder)[1] == [
        "layer 0: attention.qkv.weight holds 32 values that are not finite",
        "layer 0: mlp.experts.down holds 32 values that are not finite",
    ]


# --- refusals -------------------------------------------------------------------------------------


def refused(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(MoescopeError) as caught:
        quantised.held(config, infos(tensors))
    assert caught.value.code == ExitCode.CHECKPOINT
    return caught.value.message


@pytest.mark.parametrize("name", FORMS)
def test_hostile_companions_are_refused_from_headers(name: str) -> None:
    """Whichever tensor is gone, of another dtype or of another shape, is found before reading."""
    form = FORMS[name]
    tensors, _ = made(form, 64, 128)
    config = {form.key: form.config}
    roles = FORMATS[form.format].roles
    main = f"m{roles['weight'].suffix if form.format != 'MXFP4' else '_blocks'}"
    for role, kind in roles.items():
        victim = f"m{kind.suffix}"
        if victim not in tensors or not kind.read:
            continue
        fewer = {n: t for n, t in tensors.items() if n != victim}
        if kind.required and role != "weight" and main in fewer:
            held = None
            try:
                held = quantised.held(config, infos(fewer))
            except MoescopeError as error:
                assert victim.rpartition(".")[2] in error.message
            # without what marks it, a weight of bytes is no float: `load` refuses its dtype
            assert held is None or held[main].readings == ()
        assert main in refused(config, {**tensors, victim: tensors[victim].flatten()[:-1]})
        wrong = torch.zeros(tensors[victim].shape, dtype=torch.int16)
        assert "found I16" in refused(config, {**tensors, victim: wrong})


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: expected one of mxfp4, fp8, compressed-"),
        (
            {"quant_method": "fp8", "fmt": "e5m2"},
            'fmt: expected one of e4m3, float8_e4m3fn, found "e5',
        ),
        (
            {"quant_method": "fp8", "expert_dtype": "fp4"},
            "expert_dtype: expected one of fp8, found",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            "weight_block_size: expected two pos",
        ),
        ({"quant_method": "fp8", "rotation": "hadamard"}, "rotation: expected no such key"),
        ({"quant_method": "gptq", "bits": 5}, "bits: expected one of 2, 3, 4, 8, found 5"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "checkpoint_format: expected one of",
        ),
        (
            {"quant_method": "gptq", "group_size": 0},
            "group_size: expected -1 or a positive integer",
        ),
        ({"quant_method": "awq", "bits": 8}, "bits: expected 4, found 8"),
        (
            {"quant_method": "awq", "version": "gemv"},
            'version: expected one of gemm, GEMM, found "ge',
        ),
        ({"quant_method": "awq", "zero_point": False}, "zero_point: expected true, found false"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "quant_algo: expected one of NVFP4, found",
        ),
        ({"quant_method": "compressed-tensors"}, "config_groups: expected an object of groups"),
        (packing.compressed("marlin-24", {}), "format: expected one of pack-quantized, float-quan"),
        (
            packing.compressed("pack-quantized", packing.weights(4, "float", "group")),
            'group_0.weights.type: expected one of int, found "float"',
        ),
        (
            packing.compressed("pack-quantized", packing.weights(16, "int", "channel")),
            "weights.num_bits: expected one of 2, 3, 4, 5, 6, 7, 8, found 16",
        ),
        (
            packing.compressed("float-quantized", packing.weights(8, "float", "tensor", zp="x")),
            'weights.zp: expected no such key: what it asks for is not implemented, found "x"',
        ),
        (
            packing.compressed(
                "float-quantized",
                packing.weights(8, "float", "tensor"),
                transform_config={"config_groups": {"R1": {}}},
            ),
            "transform_config: expected nothing: sparse and transformed weights",
        ),
        (
            {"bits": 7, "group_size": 64},
            "quantization: bits: expected one of 2, 3, 4, 5, 6, 8, found 7",
        ),
        ({"bits": 4, "group_size": 48}, "group_size: expected one of 32, 64, 128, found 48"),
        (
            {"bits": 4, "mode": "nf4"},
            'mode: expected one of affine, mxfp4, mxfp8, nvfp4, found "nf4"',
        ),
        (
            {"bits": 4, "model.layers.0.mlp.gate": 8},
            "model.layers.0.mlp.gate: expected an object, true",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_config_asks_for_is_refused_by_key_and_value(block: Any, says: str) -> None:
    key = "quantization_config" if "quant_method" in block else "quantization"
    message = refused({key: block}, {})
    assert says.removeprefix("quantization: ") in message and message.startswith(
        f"config.json: {key}"
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fp8-128", "modules_to_not_convert"),
        ("int4-g32", "ignore"),
        ("awq", "modules_to_not_convert"),
    ],
)
def test_a_layer_listed_as_unquantised_is_not_packed(name: str, key: str) -> None:
    form = FORMS[name]
    tensors, _ = made(form, 64, 128)
    gate = {f"model.layers.0.mlp.gate{n[1:]}": tensor for n, tensor in tensors.items()}
    says = f"{key}: lists model.layers.*.mlp.gate as unquantised; x.safetensors: model.layers.0.mlp"
    config = {form.key: {**form.config, key: ["model.layers.*.mlp.gate"]}}
    assert says in refused(config, gate)
    plain = {"model.layers.0.mlp.gate.weight": torch.zeros(4, 8), **tensors}
    held = quantised.held(config, infos(plain))
    assert held["model.layers.0.mlp.gate.weight"].readings == () and held["m.weight"].readings


def test_mlx_says_false_of_a_layer() -> None:
    tensors, _ = made(FORMS["mlx-8-bit-g64"], 64, 128)
    config = {"quantization": {"bits": 8, "group_size": 64, "m": False}}
    assert "quantization: lists m as unquantised" in refused(config, tensors)


def test_groups_out_of_range_are_refused(tmp_path: Path) -> None:
    form = FORMS["gptq-4"]
    for wrong in (-1, 4, 2**30):
        tensors, _ = made(form, 64, 128)
        tensors["m.g_idx"][7] = wrong
        with pytest.raises(MoescopeError, match=r"m\.g_idx: expected groups 0\.\.3"):
            expanded(form, tensors)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.text(max_size=6),
    st.lists(st.integers(-1, 200), max_size=3),
    st.dictionaries(st.sampled_from(["bits", "weights", "x"]), st.integers(0, 9), max_size=2),
)


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_any_words_about_weights_are_read_or_refused(data: st.DataObject, name: str) -> None:
    form = FORMS[name]
    block = json.loads(json.dumps(form.config))
    holders = [block]
    if (groups := block.get("config_groups")) is not None:
        holders += [groups, groups["group_0"], groups["group_0"]["weights"]]
    for _ in range(data.draw(st.integers(1, 2))):
        holder = data.draw(st.sampled_from(holders))
        holder[data.draw(st.sampled_from([*holder, "dynamic", "format", "ignore", "m"]))] = (
            data.draw(_VALUES)
        )
    tensors, _ = made(form, 32, 64)
    try:
        held = quantised.held({form.key: block}, infos(tensors))
    except MoescopeError as error:
        assert error.message == single_line(error.message, 1000)
    else:
        assert all(entry.shape for entry in held.values())
