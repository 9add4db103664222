"""Rotary position embedding: frequencies, tables by position, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moescope.engine.operators import Rope, RopeScaling

Rotation = tuple[Tensor, Tensor]  # cos, signed sin [R, 1, dims]


def rotary_table(rope: Rope, positions: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and signed sin [positions, dims] in float32; the sign is that of the rotated half. Where
    frequencies depend on a lane's length, the table for long lanes follows the one for short ones:
    [2 × positions, dims]."""
    tables = [
        _table(rope, positions, long) for long in ((False, True) if switches(rope) else (False,))
    ]
    cos, sin = (torch.cat(parts).to(device) for parts in zip(*tables, strict=True))
    return cos, sin


def switches(rope: Rope) -> bool:
    """Whether a lane longer than the original context is rotated by other frequencies."""
    return rope.scaling is not None and rope.scaling.kind == "longrope"


def rotate(x: Tensor, rope: Rope, rotation: Rotation) -> Tensor:
    """x [R, heads, D]: its first `rope.dims` columns turned, in the dtype of the tables."""
    cos, sin = rotation
    dims = rope.dims
    part = x if dims == x.shape[-1] else x[..., :dims]
    if rope.style == "half":
        swapped = torch.roll(part, dims // 2, -1)
    else:
        swapped = part.reshape(*part.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned = (part * cos + swapped * sin).to(x.dtype)
    return turned if dims == x.shape[-1] else torch.cat((turned, x[..., dims:]), -1)


def _table(rope: Rope, positions: int, long: bool) -> tuple[Tensor, Tensor]:
    inverse, factor = frequencies(rope, long=long)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if rope.style == "half":
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def frequencies(rope: Rope, *, long: bool = False) -> tuple[Tensor, float]:
    """Inverse frequencies [dims / 2] and what multiplies cos and sin."""
    powers = rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims)
    if rope.scaling is None:
        return 1.0 / powers, 1.0
    return _SCALINGS[rope.scaling.kind](rope, rope.scaling, powers, long)


def _linear(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    return 1.0 / powers / s.factor, 1.0


def _yarn(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    """arXiv 2309.00071, section 3.2."""

    def correction(rotations: float) -> float:
        turns = s.original_context / (rotations * 2 * math.pi)
        return (rope.dims * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = correction(s.beta_fast), correction(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = (high - low) or 0.001
    ramp = torch.clamp((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / width, 0, 1)
    keeps = 1 - ramp
    stretched = 1.0 / (s.factor * powers)
    return stretched * (1 - keeps) + 1.0 / powers * keeps, s.attention_factor


def _llama3(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    """Long waves are stretched by the factor, short ones kept, others blended (Llama 3.1)."""
    inverse = 1.0 / powers
    wave = 2 * math.pi / inverse
    turns = s.original_context / wave
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    mixed = (1 - blend) * inverse / s.factor + blend * inverse
    long_wave = wave > s.original_context / s.low_freq_factor
    short_wave = wave < s.original_context / s.high_freq_factor
    scaled = torch.where(long_wave, inverse / s.factor, inverse)
    return torch.where(long_wave | short_wave, scaled, mixed), s.attention_factor


def _longrope(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    """arXiv 2402.13753: a factor for every frequency, one list up to the original context and one
    beyond."""
    factors = torch.tensor(s.long_factor if long else s.short_factor, dtype=torch.float32)
    scale = (s.long_mscale if long else s.short_mscale) or s.attention_factor
    return 1.0 / (factors * powers), scale


def _proportional(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    """Frequencies as of the whole head, of which only the first are turned (Gemma 4)."""
    inverse = 1.0 / powers / s.factor
    inverse[s.rotated_dims // 2 :] = 0.0
    return inverse, 1.0


def _alpha(rope: Rope, s: RopeScaling, powers: Tensor, long: bool) -> tuple[Tensor, float]:
    """NTK scaling by a fixed alpha, which stretches the base (Hunyuan)."""
    base = rope.theta * s.factor ** (rope.dims / (rope.dims - 2))
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    return 1.0 / base**exponents, 1.0


_SCALINGS: dict[str, Callable[[Rope, RopeScaling, Tensor, bool], tuple[Tensor, float]]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "alpha": _alpha,
}
