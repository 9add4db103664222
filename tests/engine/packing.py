"""Packed tensors made bit by bit, and the numbers they stand for, by loops over the definitions.

An independent formulation: what makes them shares nothing with `moescope.engine.quantised`. Codes
are random, so every code of a format occurs; scales are random and finite.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

F32 = np.float32
Made = tuple[dict[str, torch.Tensor], torch.Tensor]
Random = np.random.Generator


def e2m1(code: int) -> float:
    """OCP MX 1.0, 5.3.3: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def e4m3(code: int) -> float:
    """OFP8 1.0: bias 7, no infinities, NaN where all bits but the sign are set."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def e5m2(code: int) -> float:
    """OFP8 1.0: the upper byte of a half."""
    return float(struct.unpack("<e", bytes([0, code]))[0])


def e8m0(code: int) -> float:
    return float("nan") if code == 255 else 2.0 ** (code - 127)


def in_words(codes: list[int], bits: int) -> list[int]:
    """Codes one after another, the first lowest, as words of 32 bits."""
    whole = sum(code << (bits * at) for at, code in enumerate(codes))
    return [whole >> (32 * at) & 0xFFFFFFFF for at in range(-(-len(codes) * bits // 32))]


def per_word(codes: list[int], bits: int, order: tuple[int, ...] = ()) -> list[int]:
    """As many codes as go whole into each word of 32 bits; `order[i]` is which one is i-th."""
    count = 32 // bits
    padded = codes + [0] * (-len(codes) % count)
    groups = [padded[at : at + count] for at in range(0, len(padded), count)]
    return [
        sum(group[order[i] if order else i] << (bits * i) for i in range(count)) for group in groups
    ]


def table(rows: int, columns: int, value: Callable[[int, int], Any]) -> torch.Tensor:
    """float32 [rows, columns], by a loop."""
    return torch.tensor(
        [[float(value(r, c)) for c in range(columns)] for r in range(rows)], dtype=torch.float32
    )


def words(rows: list[list[int]], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.uint32).view(dtype).copy())


def scales(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Positive, around 0.01."""
    return torch.from_numpy(random.uniform(0.002, 0.02, shape).astype(F32)).to(dtype)


def exponents(random: Random, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.integers(110, 126, shape).astype(np.uint8))


def small_scales(random: Random, *shape: int) -> torch.Tensor:
    """Codes of positive E4M3 values."""
    return torch.from_numpy(random.integers(8, 0x7F, shape).astype(np.uint8))


def draw(random: Random, rows: int, columns: int, bits: int) -> list[list[int]]:
    return random.integers(0, 1 << bits, (rows, columns)).tolist()


def pairs(codes: list[list[int]]) -> torch.Tensor:
    """Two codes in a byte, the first in the low half."""
    return torch.tensor(
        [[row[c] | row[c + 1] << 4 for c in range(0, len(row), 2)] for row in codes],
        dtype=torch.uint8,
    )


def affine(bits: int, group: int, dtype: torch.dtype = torch.float32) -> Callable[..., Made]:
    def make(random: Random, rows: int, columns: int) -> Made:
        codes = draw(random, rows, columns, bits)
        scale = scales(random, rows, columns // group, dtype=dtype)
        bias = -scales(random, rows, columns // group, dtype=dtype)
        tensors = {
            ".weight": words([in_words(row, bits) for row in codes], np.uint32),
            ".scales": scale,
            ".biases": bias,
        }
        s, b = scale.float().numpy(), bias.float().numpy()
        return tensors, table(
            rows,
            columns,
            lambda r, c: s[r, c // group] * F32(codes[r][c]) + b[r, c // group],
        )

    return make


def mlx_float(mode: str, element: int, group: int) -> Callable[..., Made]:
    def make(random: Random, rows: int, columns: int) -> Made:
        codes = draw(random, rows, columns, element)
        if element == 8:
            codes = [[code if code & 0x7F != 0x7F else 0 for code in row] for row in codes]
        value = e2m1 if element == 4 else e4m3
        kind, of = (small_scales, e4m3) if mode == "nvfp4" else (exponents, e8m0)
        scale = kind(random, rows, columns // group)
        tensors = {
            ".weight": words([in_words(row, element) for row in codes], np.uint32),
            ".scales": scale,
        }
        return tensors, table(
            rows,
            columns,
            lambda r, c: value(codes[r][c]) * of(int(scale[r, c // group])),
        )

    return make


def gpt_oss(random: Random, rows: int, columns: int) -> Made:
    codes = draw(random, rows, columns, 4)
    scale = exponents(random, rows, columns // 32)
    blocks = pairs(codes).reshape(rows, columns // 32, 16)
    tensors = {"_blocks": blocks, "_scales": scale}
    return tensors, table(
        rows, columns, lambda r, c: e2m1(codes[r][c]) * e8m0(int(scale[r, c // 32]))
    )


def fp8(
    high: int, wide: int, suffix: str, dtype: torch.dtype = torch.float32
) -> Callable[..., Made]:
    """Scales of blocks of `high` × `wide`; 0: all rows, all columns."""

    def make(random: Random, rows: int, columns: int) -> Made:
        codes = draw(random, rows, columns, 8)
        codes = [[code if code & 0x7F != 0x7F else 0 for code in row] for row in codes]
        h, w = high or rows, wide or columns
        count = -(-rows // h), -(-columns // w)
        if dtype is torch.float8_e8m0fnu:
            scale = exponents(random, *count).view(dtype)
        else:
            scale = scales(random, *count, dtype=dtype)
        tensors = {
            ".weight": torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn),
            suffix: scale,
        }
        s = scale.float().numpy()
        return tensors, table(
            rows, columns, lambda r, c: F32(e4m3(codes[r][c])) * s[r // h, c // w]
        )

    return make


def packed_integers(
    bits: int, group: int, *, zeros: bool = False, ordered: bool = False
) -> Callable[..., Made]:
    """compressed-tensors. `group` 0: a scale per row. `ordered`: columns have groups in g_idx."""

    def make(random: Random, rows: int, columns: int) -> Made:
        size = group or columns
        codes, half = draw(random, rows, columns, bits), 1 << (bits - 1)
        scale = scales(random, rows, columns // size, dtype=torch.bfloat16)
        zero = draw(random, rows, columns // size, bits) if zeros else None
        tensors = {
            ".weight_packed": words([per_word(row, bits) for row in codes], np.int32),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor([rows, columns]),
        }
        of = [c // size for c in range(columns)]
        if ordered:
            of = random.permutation(of).tolist()
            tensors[".weight_g_idx"] = torch.tensor(of, dtype=torch.int32)
        if zero is not None:
            turned = [[zero[r][g] for r in range(rows)] for g in range(columns // size)]
            packed = words([per_word(row, bits) for row in turned], np.int32)
            tensors[".weight_zero_point"] = packed.T.contiguous()
        s = scale.float().numpy()

        def value(r: int, c: int) -> Any:
            offset = zero[r][of[c]] if zero is not None else half
            return F32(codes[r][c] - offset) * s[r, of[c]]

        return tensors, table(rows, columns, value)

    return make


def nvfp4(whole: str, packed: str, *, divides: bool) -> Callable[..., Made]:
    def make(random: Random, rows: int, columns: int) -> Made:
        codes = draw(random, rows, columns, 4)
        scale = small_scales(random, rows, columns // 16)
        of_all = torch.tensor([float(random.uniform(1.0, 3.0))])
        tensors = {
            packed: pairs(codes),
            ".weight_scale": scale.view(torch.float8_e4m3fn),
            whole: of_all,
        }
        g = of_all.numpy()[0]

        def value(r: int, c: int) -> Any:
            s = F32(e4m3(int(scale[r, c // 16])))
            return F32(e2m1(codes[r][c])) * (s / g if divides else s * g)

        return tensors, table(rows, columns, value)

    return make


def mxfp4_packed(random: Random, rows: int, columns: int) -> Made:
    codes = draw(random, rows, columns, 4)
    scale = exponents(random, rows, columns // 32)
    tensors = {".weight_packed": pairs(codes), ".weight_scale": scale}
    return tensors, table(
        rows, columns, lambda r, c: e2m1(codes[r][c]) * e8m0(int(scale[r, c // 32]))
    )


def gptq(bits: int, group: int, *, less: int, ordered: bool = False) -> Callable[..., Made]:
    """`less`: what stored zeros lack (1 in the first version). `ordered`: a g_idx that jumps."""

    def make(random: Random, rows: int, columns: int) -> Made:
        size = group or columns
        codes = draw(random, columns, rows, bits)  # [in, out]
        zero = draw(random, columns // size, rows, bits)
        scale = scales(random, columns // size, rows, dtype=torch.float16)
        stored = [[(z - less) % (1 << bits) for z in row] for row in zero]
        turned = [[codes[c][r] for c in range(columns)] for r in range(rows)]
        of = [c // size for c in range(columns)]
        if ordered:
            of = random.permutation(of).tolist()
        tensors = {
            ".qweight": words([in_words(row, bits) for row in turned], np.int32).T.contiguous(),
            ".qzeros": words([in_words(row, bits) for row in stored], np.int32),
            ".scales": scale,
            ".g_idx": torch.tensor(of, dtype=torch.int32),
        }
        s = scale.float().numpy()
        return tensors, table(
            rows, columns, lambda r, c: s[of[c], r] * F32(codes[c][r] - zero[of[c]][r])
        )

    return make


def awq(group: int) -> Callable[..., Made]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def make(random: Random, rows: int, columns: int) -> Made:
        codes, zero = draw(random, columns, rows, 4), draw(random, columns // group, rows, 4)
        scale = scales(random, columns // group, rows, dtype=torch.float16)
        tensors = {
            ".qweight": words([per_word(row, 4, order) for row in codes], np.int32),
            ".qzeros": words([per_word(row, 4, order) for row in zero], np.int32),
            ".scales": scale,
        }
        s = scale.float().numpy()
        return tensors, table(
            rows, columns, lambda r, c: s[c // group, r] * F32(codes[c][r] - zero[c // group][r])
        )

    return make
