"""Quantised weights: every format against loops over its definition, and against mlx."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine import quantised
from moescope.engine.quantised import numbers
from moescope.engine.quantised.formats import FORMATS
from tests.engine import packed_forms, packing
from tests.engine.packed_forms import FORMS, expanded, infos, made


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
    short = {"float8_e5m2": "F8_E5M2", **packed_forms.DTYPES}[dtype]
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
        (held,) = quantised.held({form.key: form.config}, infos(tensors)).values()
        assert held.readings[0].format == form.format
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
