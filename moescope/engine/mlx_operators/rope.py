"""Rotary position embedding: frequencies and tables in numpy, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine.operators import Rope, RopeScaling

F32 = NDArray[np.float32]
Found = tuple[NDArray[Any], float]


def rotary_table(rope: Rope, positions: int) -> tuple[F32, F32]:
    """cos and signed sin [positions, dims]; the sign is that of the rotated half. Where frequencies
    depend on a lane's length, the table for long lanes follows the one for short ones: [2 ×
    positions, dims]."""
    tables = [_table(rope, positions, long) for long in (False, True)[: 1 + switches(rope)]]
    cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    return cos, sin


def switches(rope: Rope) -> bool:
    """Whether a lane longer than the original context is rotated by other frequencies."""
    return rope.scaling is not None and rope.scaling.kind == "longrope"


def rotate(x: mx.array, rope: Rope, rotation: tuple[mx.array, mx.array]) -> mx.array:
    """x [R, heads, D]: its first `rope.dims` columns turned, in the dtype of the tables."""
    cos, sin = rotation
    dims = rope.dims
    part = x if dims == x.shape[-1] else x[..., :dims]
    if rope.style == "half":
        swapped = mx.concatenate([part[..., dims // 2 :], part[..., : dims // 2]], -1)
    else:
        pairs = part.reshape(*part.shape[:-1], dims // 2, 2)
        swapped = mx.concatenate([pairs[..., 1:], pairs[..., :1]], -1).reshape(part.shape)
    turned = (part * cos + swapped * sin).astype(x.dtype)
    return turned if dims == x.shape[-1] else mx.concatenate([turned, x[..., dims:]], -1)


def _table(rope: Rope, positions: int, long: bool) -> tuple[F32, F32]:
    inverse, factor = frequencies(rope, long=long)
    angles = np.arange(positions, dtype=np.float32)[:, None] * inverse
    cos, sin = np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)
    if rope.style == "half":
        return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
    return cos.repeat(2, -1), np.stack([-sin, sin], -1).reshape(positions, -1)


def frequencies(rope: Rope, *, long: bool = False) -> tuple[F32, float]:
    """Inverse frequencies [dims / 2] and what multiplies cos and sin."""
    powers = _powers(rope.theta, rope.dims)
    inverse: NDArray[Any]
    if rope.scaling is None:
        return np.float32(1) / powers, 1.0
    inverse, factor = _SCALINGS[rope.scaling.kind](rope, rope.scaling, powers, long)
    return inverse.astype(np.float32), factor


def _powers(base: float, dims: int) -> F32:
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    powers: F32 = np.float32(base) ** exponents
    return powers


def _linear(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    return 1 / powers / np.float32(s.factor), 1.0


def _yarn(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    """arXiv 2309.00071, section 3.2."""

    def correction(rotations: float) -> float:
        turns = s.original_context / (rotations * 2 * math.pi)
        return (rope.dims * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = correction(s.beta_fast), correction(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(rope.dims // 2, dtype=np.float32) - low) / width, 0, 1)
    keeps = (1 - ramp).astype(np.float32)
    stretched = 1 / (np.float32(s.factor) * powers)
    return stretched * (1 - keeps) + 1 / powers * keeps, s.attention_factor


def _llama3(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    """Long waves are stretched by the factor, short ones kept, others blended (Llama 3.1)."""
    inverse = 1 / powers
    wave = np.float32(2 * math.pi) / inverse
    blend = (s.original_context / wave - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    mixed = (1 - blend) * inverse / s.factor + blend * inverse
    is_long = wave > s.original_context / s.low_freq_factor
    is_short = wave < s.original_context / s.high_freq_factor
    scaled = np.where(is_long, inverse / s.factor, inverse)
    return np.where(is_long | is_short, scaled, mixed), s.attention_factor


def _longrope(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    """arXiv 2402.13753: a factor for every frequency, one list up to the original context and one
    beyond."""
    factors = np.array(s.long_factor if long else s.short_factor, dtype=np.float32)
    scale = (s.long_mscale if long else s.short_mscale) or s.attention_factor
    return 1 / (factors * powers), scale


def _proportional(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    """Frequencies as of the whole head, of which only the first are turned (Gemma 4)."""
    inverse = 1 / powers / np.float32(s.factor)
    inverse[s.rotated_dims // 2 :] = 0.0
    return inverse, 1.0


def _alpha(rope: Rope, s: RopeScaling, powers: F32, long: bool) -> Found:
    """NTK scaling by a fixed alpha, which stretches the base (Hunyuan)."""
    return 1 / _powers(rope.theta * s.factor ** (rope.dims / (rope.dims - 2)), rope.dims), 1.0


_SCALINGS: dict[str, Callable[[Rope, RopeScaling, F32, bool], Found]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "alpha": _alpha,
}
