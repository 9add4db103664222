"""What mlx-lm writes: integers with a scale and a bias per group, or small floats with a scale.

Codes lie in uint32, the lowest bits first, without gaps: definitions in `mlx.core.quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from moescope.engine.quantised import numbers
from moescope.engine.quantised.numbers import Array
from moescope.engine.quantised.packed import Group, Packed

Arrays = Mapping[str, Array]

AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# mode -> what mlx allows: (bits, group size)
PAIRS: dict[str, tuple[tuple[int, int], ...]] = {
    "affine": tuple((bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS),
    "mxfp4": ((4, 32),),
    "mxfp8": ((8, 32),),
    "nvfp4": ((4, 16),),
}
# what a global scale of nvfp4 is divided by: the largest E2M1 times the largest E4M3
_NVFP4_RANGE = np.float32(6 * 448)


def readings(group: Group, mode: str, pair: tuple[int, int]) -> Iterator[Packed]:
    """As `pair`, (bits, group size), where words and scales are of one size so."""
    weight, scales = group.tensors["weight"].shape, group.tensors["scales"].shape
    biases = group.tensors.get("biases")
    if len(weight) < 2 or weight[:-1] != scales[:-1] or (biases and biases.shape != scales):
        return
    whole = group.tensors.get("global_scale")
    if whole is not None and whole.shape not in ((), (1,), weight[:-2]):
        return
    bits, size = pair
    columns = scales[-1] * size
    if weight[-1] * 32 == columns * bits:
        yield group.packed((*weight[:-1], columns), bits, size, variant=mode)


def affine(packed: Packed, arrays: Arrays) -> Array:
    """scale * code + bias."""
    values = numbers.codes(arrays["weight"], packed.bits).astype(np.float32)
    numbers.scaled(values, arrays["scales"], packed.group_size)
    grouped = values.reshape(*arrays["biases"].shape, packed.group_size)
    grouped += arrays["biases"][..., None]
    return values


def mxfp4(packed: Packed, arrays: Arrays) -> Array:
    scales = numbers.E8M0[arrays["scales"]]
    return numbers.scaled(numbers.e2m1_pairs(arrays["weight"]), scales, packed.group_size)


def mxfp8(packed: Packed, arrays: Arrays) -> Array:
    values = numbers.E4M3[numbers.codes(arrays["weight"], 8)]
    return numbers.scaled(values, numbers.E8M0[arrays["scales"]], packed.group_size)


def nvfp4(packed: Packed, arrays: Arrays) -> Array:
    scales = numbers.E4M3[arrays["scales"]]
    if (whole := arrays.get("global_scale")) is not None:
        scales = scales * (numbers.of_all(whole) / _NVFP4_RANGE)
    return numbers.scaled(numbers.e2m1_pairs(arrays["weight"]), scales, packed.group_size)
