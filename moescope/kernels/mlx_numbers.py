"""Numbers as the router in plain MLX operators needs them: float64, rounding, order, places.

Of MLX's functions none is used whose error would show: its exponential is a float32 one even for
float64, so powers of e stand in for it; its sorts promise nothing about ties, so values are sorted
as integers with the id in the low bits. Arrays are [R, n], of R rows; `wide` needs the CPU.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

E_MAX = 4096  # ids are twelve bits of a key


def wide(x: mx.array) -> mx.array:
    return x.astype(mx.float64)


def places(n: int, dtype: type) -> mx.array:
    """0 to n - 1 as [1, n]: a constant of what is traced."""
    return mx.array(np.arange(n, dtype=dtype)[None])


def top_of(x: mx.array) -> mx.array:
    """The greatest of a row, or NaN if there is one."""
    return x.max(-1, keepdims=True)


def sum_of(x: mx.array) -> mx.array:
    return x.sum(-1, keepdims=True)


def exp(x: mx.array) -> mx.array:
    """e^x in float64: MLX's own exponential goes through float32."""
    return mx.power(mx.array(math.e, dtype=mx.float64), x)


def rounded(x: mx.array, dtype: mx.array) -> mx.array:
    """`x` rounded to the dtype at that place of `policy_rows.DTYPES`, as float32; through float32
    first, as the reference does."""
    single = x.astype(mx.float32)
    halves = [single.astype(narrow).astype(mx.float32) for narrow in (mx.bfloat16, mx.float16)]
    return mx.where(dtype == 1, halves[0], mx.where(dtype == 2, halves[1], single))


def descending(x: mx.array) -> mx.array:
    """float32 as int64 in the opposite order, within 32 bits; both zeros are one number."""
    bits = mx.where(x == 0, 0.0, x).view(mx.int32)
    return -1 - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(mx.int64)


def value_of(key: mx.array) -> mx.array:
    """The float32 that `descending` made `key` of."""
    bits = (-1 - key).astype(mx.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(mx.float32)


def take(x: mx.array, at: mx.array) -> mx.array:
    """x [1 or R, n] at places [R, m]. Places must be within bounds: MLX does not look."""
    x = mx.broadcast_to(x, (len(at), x.shape[1])) if len(x) != len(at) else x
    return mx.take_along_axis(x, at, axis=-1)


def padded(x: mx.array, width: int, value: float) -> mx.array:
    if x.shape[1] == width:
        return x
    return mx.pad(x, [(0, 0), (0, width - x.shape[1])], constant_values=value)


def single(x: mx.array, valid: mx.array) -> mx.array:
    return mx.where(valid, x, math.nan).astype(mx.float32).squeeze(-1)
