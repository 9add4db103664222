"""Integers of a few bits in words of 32: compressed-tensors, GPTQ and AWQ. All stand for a matrix
[out, in], and give (code - zero) * scale.

Sources: compressed-tensors `pack_quantized.py` (packs along in, as many codes as fit into a word);
AutoGPTQ `qlinear_cuda_old.py` (packs along in, without gaps; zeros less 1, but for its `gptq_v2`);
AutoAWQ `packing_utils.py` (packs along out, in the order of `AWQ_ORDER`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from moescope.engine.config import bad
from moescope.engine.quantised import numbers
from moescope.engine.quantised.numbers import Array
from moescope.engine.quantised.packed import Group, Packed

Arrays = Mapping[str, Array]
# column 8 n + AWQ_ORDER[i] lies in bits 4 i of word n
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACKED_BITS, GPTQ_BITS = (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 8)
GPTQ_V1, GPTQ_V2 = "gptq", "gptq_v2"


def packed_readings(group: Group, bits: int, size: int, *, zeros: bool) -> Iterator[Packed]:
    """compressed-tensors; `size` 0 is a scale per row. With it, in must fill its words."""
    weight, scale = group.tensors["weight"].shape, group.tensors["scale"].shape
    per_word = 32 // bits
    if len(weight) < 2 or len(scale) != len(weight) or scale[:-1] != weight[:-1]:
        return
    columns = scale[-1] * size if size else weight[-1] * per_word
    if -(-columns // per_word) != weight[-1] or not (size or scale[-1] == 1):
        return
    if zeros != ("zero_point" in group.tensors):
        return
    packed_rows = -(-weight[-2] // per_word)
    if zeros and group.tensors["zero_point"].shape != (*weight[:-2], packed_rows, scale[-1]):
        return
    if (order := group.tensors.get("g_idx")) is not None and order.shape != (columns,):
        return
    yield group.packed((*weight[:-1], columns), bits, size)


def packed_integers(packed: Packed, arrays: Arrays) -> Array:
    """compressed-tensors `pack-quantized`; symmetric codes are stored plus half their range."""
    *_, high, wide = packed.shape
    values = numbers.fields(arrays["weight"], packed.bits)[..., :wide].astype(np.float32)
    if (zeros := arrays.get("zero_point")) is None:
        values -= np.float32(1 << (packed.bits - 1))
    else:
        along_rows = numbers.fields(zeros.swapaxes(-1, -2), packed.bits)[..., :high]
        values -= _by_column(along_rows.swapaxes(-1, -2).astype(np.float32), packed, arrays)
    values *= _by_column(arrays["scale"], packed, arrays)
    return values


def _by_column(each: Array, packed: Packed, arrays: Arrays) -> Array:
    """What groups [.., rows, groups] have, for each column [.., rows, columns]."""
    if not packed.group_size:
        return each
    order = arrays.get("g_idx")
    if order is None or (order < 0).any():  # none, or not yet filled in: groups in a row
        return each.repeat(packed.group_size, axis=-1)
    return each[..., _checked(order, each.shape[-1], packed)]


def _checked(order: Array, groups: int, packed: Packed) -> Array:
    if order.size and not 0 <= order.min() <= order.max() < groups:
        raise bad(f"{packed.name_of('g_idx')}: expected groups 0..{groups - 1}, found others")
    return order


def gptq_readings(group: Group, bits: int, size: int, variant: str) -> Iterator[Packed]:
    """`size` 0 is one group of all columns."""
    words, scales = group.tensors["weight"].shape, group.tensors["scales"].shape
    zeros, order = group.tensors["zeros"].shape, group.tensors.get("g_idx")
    if not len(words) == len(scales) == len(zeros) == 2:
        return
    columns, rows = words[0] * 32 // bits, words[1]
    if (columns * bits, columns % 8, rows % 8) != (words[0] * 32, 0, 0):
        return
    groups = -(-columns // size) if size else 1
    if scales != (groups, rows) or zeros != (groups, rows * bits // 32) or rows * bits % 32:
        return
    if order is not None and order.shape != (columns,):
        return
    yield group.packed((rows, columns), bits, size or columns, variant=variant)


def gptq(packed: Packed, arrays: Arrays) -> Array:
    rows, columns = packed.shape
    codes = numbers.codes(arrays["weight"].T, packed.bits)
    zeros = numbers.codes(arrays["zeros"], packed.bits)[:, :rows].T
    if packed.variant == GPTQ_V1:  # zeros are stored less 1, in their few bits
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << packed.bits) - 1)
    usual = np.arange(columns) // packed.group_size
    order = arrays.get("g_idx", usual)
    values, scales = codes.astype(np.float32), np.ascontiguousarray(arrays["scales"].T)
    if zeros.shape[1] * packed.group_size == columns and np.array_equal(order, usual):
        grouped = values.reshape(rows, zeros.shape[1], packed.group_size)
        grouped -= zeros[..., None]
        grouped *= scales[..., None]
        return values
    order = _checked(order, zeros.shape[1], packed)
    values -= zeros[:, order]
    values *= scales[:, order]
    return values


def awq_readings(group: Group, bits: int, size: int) -> Iterator[Packed]:
    words, scales = group.tensors["weight"].shape, group.tensors["scales"].shape
    zeros = group.tensors["zeros"].shape
    if not len(words) == len(scales) == len(zeros) == 2:
        return
    columns, rows = words[0], words[1] * 32 // bits
    size = size or columns
    groups = columns // size
    if groups * size == columns and scales == (groups, rows) and zeros == (groups, words[1]):
        yield group.packed((rows, columns), bits, size)


def awq(packed: Packed, arrays: Arrays) -> Array:
    rows, columns = packed.shape
    values = _awq_codes(arrays["weight"], packed.bits).astype(np.float32)
    grouped = values.reshape(-1, packed.group_size, rows)
    grouped -= _awq_codes(arrays["zeros"], packed.bits)[:, None]
    grouped *= arrays["scales"][:, None]
    return values.reshape(columns, rows).T


def _awq_codes(words: Array, bits: int) -> Array:
    stored = numbers.codes(words, bits).reshape(*words.shape, len(AWQ_ORDER))
    out = np.empty_like(stored)
    for at, column in enumerate(AWQ_ORDER):
        out[..., column] = stored[..., at]
    return out.reshape(words.shape[0], -1)
