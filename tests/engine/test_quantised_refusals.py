"""Quantised weights that are refused: hostile headers, and configs that ask for the unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine import quantised
from moescope.engine.quantised.formats import FORMATS
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from tests.engine.packed_forms import FORMS, compressed, expanded, infos, made, weights


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
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo: expected one of NVFP4, W4A16_NVFP4, FP8, FP8_PER_CHANNEL_PER_TOKEN, MIXED",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            "quantized_layers: expected an object of layers, found nothing",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"lm_head": {"quant_algo": "NVFP4", "group_size": 32}},
            },
            "quantized_layers.lm_head.group_size: expected 16, found 32",
        ),
        ({"quant_method": "compressed-tensors"}, "config_groups: expected an object of groups"),
        (
            compressed("marlin-24", {}),
            "format: expected one of pack-quantized, float-quan",
        ),
        (
            compressed("pack-quantized", weights(4, "float", "group")),
            'group_0.weights.type: expected one of int, found "float"',
        ),
        (
            compressed("pack-quantized", weights(16, "int", "channel")),
            "weights.num_bits: expected one of 2, 3, 4, 5, 6, 7, 8, found 16",
        ),
        (
            compressed("float-quantized", weights(8, "float", "tensor", zp="x")),
            'weights.zp: expected no such key: what it asks for is not implemented, found "x"',
        ),
        (
            compressed(
                "float-quantized",
                weights(8, "float", "tensor"),
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


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_any_shapes_are_expanded_or_refused(data: st.DataObject, name: str) -> None:
    """Whatever the headers say, what is taken as packed can be expanded."""
    form = FORMS[name]
    tensors, _ = made(form, 32, 64)
    sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64])
    for victim in data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1, max_size=2)):
        shape = data.draw(st.lists(sizes, max_size=3))
        tensors[victim] = torch.zeros(shape, dtype=tensors[victim].dtype)
    try:
        held = quantised.held({form.key: form.config}, infos(tensors))
    except MoescopeError:
        return
    (packed,) = (entry.readings[0] for entry in held.values() if entry.readings)
    assert expanded(form, tensors).shape == packed.shape
