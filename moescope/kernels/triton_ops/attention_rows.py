"""A new token's queries, key and value as attention takes them: normed, clipped, turned to their
position; and the gate on what attention gives. Parts of the kernel in `attention`, with the
rounding points of `torch_operators.TorchAttention`.

Letters: R heads side by side, D head width, dims those of its columns that are turned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moescope.kernels.triton_ops.arithmetic import log1p

# How queries and keys are normed: each head alone, before or after it is turned, or all at once.
NORMS = {"none": 0, "per_head": 1, "flat": 2, "per_head_after": 3}
PER_HEAD = tl.constexpr(NORMS["per_head"])
FLAT = tl.constexpr(NORMS["flat"])
AFTER = tl.constexpr(NORMS["per_head_after"])
ROPES = {"none": 0, "half": 1, "interleaved": 2}
HALF = tl.constexpr(ROPES["half"])
GATES = {"none": 0, "sigmoid": 1, "softplus": 2}
SIGMOID = tl.constexpr(GATES["sigmoid"])


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def flat_factor(row, width: tl.constexpr, PAD: tl.constexpr, eps):
    """1 / root mean square of `width` values."""
    i = tl.arange(0, PAD)
    x = tl.load(row + i, mask=i < width, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)


@triton.jit
def partners(d, dims: tl.constexpr, ROPE: tl.constexpr):
    """The column that each column is turned with; its own beyond `dims`."""
    other = tl.where(d >= dims // 2, d - dims // 2, d + dims // 2) if ROPE == HALF else d ^ 1
    return tl.where(d < dims, other, d)


@triton.jit
def placed(
    row,  # pointer to the row's first head
    at,  # [R, 1], the first column of each head
    there,  # [R, 1], which heads there are
    factor,  # of the norm, where it is flat
    weight,  # pointer to the norm's weights
    weight_at,  # [R, 1], those of each head
    d,  # [D_PAD]
    other,  # [D_PAD], see `partners`
    cos,  # [1, D_PAD]
    sin,
    clip,
    eps,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_WIDE: tl.constexpr,
    CLIP: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Heads [R, D_PAD] of queries or keys."""
    mask = there & (d < D)[None, :]
    x = tl.load(row + at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    by, by_other = 1.0, 1.0
    if NORM == PER_HEAD:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    if NORM != 0:
        by = tl.load(weight + weight_at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if (NORM == PER_HEAD) | (NORM == FLAT):
        x = _normed(x, factor, by, NORM_WIDE, dtype)
    x = clipped(x, clip, CLIP)
    if ROPE != 0:
        y = tl.load(row + at + other[None, :], mask=mask, other=0.0).to(tl.float32)
        if (NORM == PER_HEAD) | (NORM == FLAT):
            by_other = tl.load(weight + weight_at + other[None, :], mask=mask, other=0.0)
            y = _normed(y, factor, by_other.to(tl.float32), NORM_WIDE, dtype)
        turned = _turned(x, clipped(y, clip, CLIP), cos, sin, ROPE_WIDE, dtype)
        x = turned if DIMS == D else tl.where((d < DIMS)[None, :], turned, x)
    if NORM == AFTER:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = _normed(x, factor, by, NORM_WIDE, dtype)
    return x


@triton.jit
def clipped(x, clip, CLIP: tl.constexpr):
    if CLIP:
        x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))  # a NaN stays one
    return x


@triton.jit
def unit_rows(x, eps, D: tl.constexpr, dtype: tl.constexpr):
    """[D_PAD] over its root mean square."""
    return rounded_to(x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps), dtype)


@triton.jit
def opened(mixed, gate, at, mask, GATE: tl.constexpr, dtype: tl.constexpr):
    """What attention gives, times the sigmoid or softplus of what `gate` holds at `at`."""
    z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    if GATE == SIGMOID:
        z = 1 / (1 + tl.exp(-z))
    else:
        z = tl.where(z > 0, z, 0.0) + log1p(tl.exp(-tl.abs(z)))
    return rounded_to(mixed, dtype) * rounded_to(z, dtype)


@triton.jit
def scaled(x, scale, cap, CAP: tl.constexpr):
    """Scores times log2 e. With CAP, cap × tanh(scale × x), `cap` being the one that holds it."""
    x = x * scale
    if CAP:
        small = tl.exp(-2 * tl.abs(x))
        size = (1 - small) / (1 + small)
        x = tl.where(x < 0, -size, size) * cap
    return x


@triton.jit
def _normed(x, factor, weight, WIDE: tl.constexpr, dtype: tl.constexpr):
    if WIDE:
        y = rounded_to(x * factor * weight, dtype)
    else:
        y = rounded_to(rounded_to(x * factor, dtype) * weight, dtype)
    return y


@triton.jit
def _turned(x, partner, cos, sin, WIDE: tl.constexpr, dtype: tl.constexpr):
    """`sin` carries the sign of the half."""
    if WIDE:
        total = x * cos + partner * sin
    else:
        total = rounded_to(x * cos, dtype) + rounded_to(partner * sin, dtype)
    return rounded_to(total, dtype)
