"""Bytes and bits as numbers: the small float formats, and codes of a few bits in a row.

E4M3 and E5M2: OCP 8-bit floating point (OFP8) 1.0; E2M1 and E8M0: OCP Microscaling (MX) 1.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_PLAIN = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.uint8,
}


def _small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """Every value of a signed float format, by code, as though none were NaN or infinite."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.ldexp(1.0 + mantissa, exponent - bias)
    subnormal = np.ldexp(mantissa, 1 - bias)
    return (sign * np.where(exponent == 0, subnormal, normal)).astype(np.float32)


def _e4m3() -> Array:
    values = _small_floats(4, 3, 7)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _e5m2() -> Array:
    values = _small_floats(5, 2, 15)
    for sign, start in ((1.0, 0x7C), (-1.0, 0xFC)):
        values[start] = sign * np.inf
        values[start + 1 : start + 4] = np.nan
    return values


def _e8m0() -> Array:
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


E2M1 = _small_floats(2, 1, 1)
E4M3 = _e4m3()
E5M2 = _e5m2()
E8M0 = _e8m0()
_TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}
# both values of a byte of two codes, the low half first, as one item of eight bytes
_E2M1_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1).view(np.uint64)[:, 0]


def decode(dtype: str, data: bytes | bytearray | memoryview, shape: tuple[int, ...]) -> Array:
    """The bytes of a published tensor as an array: floats as float32, integers as they are."""
    if dtype in _TABLES:
        return _TABLES[dtype][np.frombuffer(data, np.uint8)].reshape(shape)
    if dtype == "BF16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    array = np.frombuffer(data, _PLAIN[dtype]).reshape(shape)
    return array.astype(np.float32) if dtype in ("F16", "F64") else array


def codes(words: Array, bits: int) -> Array:
    """Codes of 1 to 8 bits, in a row without gaps along the last dimension of `words` (of any
    integer dtype), the lowest bits first: uint8 [.., bits of a row / bits]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    *lead, size = data.shape
    if 8 % bits == 0:
        out = np.empty((*data.shape, 8 // bits), np.uint8)
        for at in range(8 // bits):
            np.right_shift(data, at * bits, out=out[..., at])
        out &= np.uint8((1 << bits) - 1)
        return out.reshape(*lead, -1)
    # eight codes lie in as many bytes as a code has bits
    groups = data.reshape(*lead, size // bits, bits)
    wide = np.zeros(groups.shape[:-1], np.uint64)
    for at in range(bits):
        wide |= groups[..., at].astype(np.uint64) << np.uint64(8 * at)
    out = np.empty((*wide.shape, 8), np.uint8)
    for at in range(8):
        out[..., at] = (wide >> np.uint64(at * bits)) & np.uint64((1 << bits) - 1)
    return out.reshape(*lead, -1)


def fields(words: Array, bits: int) -> Array:
    """Codes of `bits` in words of 32, as many as go into one whole, the lowest bits first: what is
    left of a word is not used. uint8 [.., words * (32 // bits)]."""
    if 32 % bits == 0:
        return codes(words, bits)
    count = 32 // bits
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    wide = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts
    return (wide & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(*words.shape[:-1], -1)


def e2m1_pairs(data: Array) -> Array:
    """Bytes (or words) of two E2M1 codes each, the low half first, as float32."""
    return _E2M1_PAIRS[np.ascontiguousarray(data).view(np.uint8)].view(np.float32)


def scaled(values: Array, scales: Array, group: int) -> Array:
    """`values` [.., n] times `scales` [.., n / group]; float32, in place where it can be."""
    grouped = values.reshape(*scales.shape, group)
    grouped *= scales[..., None]
    return values


def of_all(scale: Array) -> Array:
    """One scale, or one of each expert, to be applied to [.., rows, groups]."""
    return scale.reshape(-1)[0] if scale.size == 1 else scale[..., None, None]
