"""float32 functions whose rounding is part of the contract, for Triton kernels.

Hardware's exp2 and log are too coarse to rank by: two scores that differ by more than 8 ulp must
keep their order. None of this may be contracted: launch with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # few bits: n times it is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def to_bfloat16(x):
    """float32 rounded to bfloat16 half to even, as float32. In integers, because Triton's
    interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded(x, dtype):
    """float32 rounded to the dtype at that place in `policy_rows.DTYPES`, a number at run time."""
    y = x
    if dtype == 1:
        y = to_bfloat16(x)
    elif dtype == 2:
        y = x.to(tl.float16).to(tl.float32)
    return y


@triton.jit
def exp(x, low):
    """e^(x + low) for x <= 0 to about an ulp, denormals included. NaN stays NaN."""
    far = x < -110.0
    x = tl.where(far, -110.0, x)
    n = tl.floor(x * LOG2E + 0.5)
    r = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, x)) + tl.where(far, 0.0, low)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = tl.where(x == x, n, 0.0).to(tl.int32)
    half = power >> 1  # two factors, so that a denormal is rounded once
    return p * _power_of_two(half) * _power_of_two(power - half)


@triton.jit
def exp_of_difference(a, b):
    """e^(a - b) for a <= b, with what float32 loses in the difference."""
    d = a - b
    back = d - a
    return exp(d, (a - (d - back)) - (b + back))


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1], to about an ulp: twice the series of artanh."""
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    p = tl.fma(q, 1.0 / 15, 1.0 / 13)
    p = tl.fma(p, q, 1.0 / 11)
    p = tl.fma(p, q, 1.0 / 9)
    p = tl.fma(p, q, 1.0 / 7)
    p = tl.fma(p, q, 1.0 / 5)
    p = tl.fma(p, q, 1.0 / 3)
    return 2.0 * tl.fma(s, q * p, s)


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap), rounded to float32 once; infinities stay."""
    y = x.to(tl.float64) / cap.to(tl.float64)
    size = tl.abs(y)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    t = tl.where(size < 1e-4, size - size * size * size / 3.0, large)
    capped = (tl.where(y < 0, -t, t) * cap).to(tl.float32)
    return tl.where(tl.abs(x) == float("inf"), x, capped)


@triton.jit
def ordered(x):
    """float32 as int32 in the same order; both zeros are one number. NaN must not occur."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float32 that `ordered` made `key` of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)
