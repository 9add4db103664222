"""Small floats with scales: FP8 in blocks, rows or whole tensors, and MXFP4 and NVFP4 by bytes.

Sources: DeepSeek-V3's `weight_scale_inv` (it multiplies, in spite of its name); OpenAI's gpt-oss
(`*_blocks`, `*_scales`); the compressed-tensors and ModelOpt formats; OCP Microscaling 1.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from moescope.engine.quantised import numbers
from moescope.engine.quantised.numbers import Array
from moescope.engine.quantised.packed import Group, Packed

Arrays = Mapping[str, Array]


def fp8_readings(group: Group, rows: int, columns: int) -> Iterator[Packed]:
    """With scales of blocks of `rows` × `columns`; 1 × 0 is a scale per row, 0 × 0 one in all."""
    shape, scale = group.tensors["weight"].shape, group.tensors["scale"].shape
    if len(shape) >= 2 and _scale_shape_fits(shape, scale, rows, columns):
        yield group.packed(shape, 8, columns, block_rows=rows)


def _scale_shape_fits(
    shape: tuple[int, ...], scale: tuple[int, ...], rows: int, columns: int
) -> bool:
    *lead, high, wide = shape
    counts = (-(-high // rows) if rows else 1, -(-wide // columns) if columns else 1)
    if (*lead, *counts) == scale:
        return True
    # one scale for the whole (of each expert) may leave dimensions of 1 out; so may a scale per row
    if rows == 1 and not columns:
        return scale == (*lead, high)
    return not rows and scale in (tuple(lead), (*lead, 1), (1,))


def fp8(packed: Packed, arrays: Arrays) -> Array:
    """Each value times the scale of its block. Values come decoded, so as to be written over."""
    values, scale = arrays["weight"], arrays["scale"]
    *lead, high, wide = values.shape
    if not packed.group_size:
        rows = high if packed.block_rows else 1
        values *= scale.reshape(*lead, rows, 1)
        return values
    each = scale.repeat(packed.group_size, axis=-1)[..., :wide]
    for at in range(scale.shape[-2]):  # a block of rows at a time
        part = slice(at * packed.block_rows, (at + 1) * packed.block_rows)
        values[..., part, :] *= each[..., at : at + 1, :]
    return values


def mxfp4_blocks_readings(group: Group) -> Iterator[Packed]:
    """[.., rows, columns / 32, 16] bytes and [.., rows, columns / 32] exponents."""
    blocks, scales = group.tensors["weight"].shape, group.tensors["scales"].shape
    if len(blocks) >= 3 and blocks[-1] == 16 and blocks[:-1] == scales:
        yield group.packed((*scales[:-1], scales[-1] * 32), 4, 32)


def mxfp4_blocks(packed: Packed, arrays: Arrays) -> Array:
    blocks = arrays["weight"]
    values = numbers.e2m1_pairs(blocks.reshape(*blocks.shape[:-2], -1))
    return numbers.scaled(values, numbers.E8M0[arrays["scales"]], 32)


def fp4_readings(group: Group, size: int, *, whole: bool) -> Iterator[Packed]:
    """[.., rows, columns / 2] bytes and a scale per `size` columns; `whole`: and one of all."""
    weight, scale = group.tensors["weight"].shape, group.tensors["scale"].shape
    columns = scale[-1] * size if scale else 0
    if len(weight) < 2 or (*scale[:-1], columns) != (*weight[:-1], 2 * weight[-1]):
        return
    if whole and group.tensors["global_scale"].shape not in ((), (1,), weight[:-2]):
        return
    yield group.packed((*weight[:-1], columns), 4, size)


def nvfp4_divided(packed: Packed, arrays: Arrays) -> Array:
    """compressed-tensors: scales are divided by the global one."""
    scales = arrays["scale"] / numbers.of_all(arrays["global_scale"])
    return numbers.scaled(numbers.e2m1_pairs(arrays["weight"]), scales, packed.group_size)


def nvfp4_multiplied(packed: Packed, arrays: Arrays) -> Array:
    """ModelOpt: scales are multiplied by the global one."""
    scales = arrays["scale"] * numbers.of_all(arrays["global_scale"])
    return numbers.scaled(numbers.e2m1_pairs(arrays["weight"]), scales, packed.group_size)


def mxfp4(packed: Packed, arrays: Arrays) -> Array:
    scale = arrays["scale"]
    scales = numbers.E8M0[scale] if scale.dtype == np.uint8 else scale
    return numbers.scaled(numbers.e2m1_pairs(arrays["weight"]), scales, packed.group_size)
