"""Attention of one token in each of N lanes, in one launch: q and k norm, clip, rotation, the new
row of the cache, softmax over the cache, split so that few heads fill the device, and its gate.

Positions and lanes are read from device memory, so one launch serves every length. The splits of a
lane's key head merge in the last of them to finish, in a fixed order: sums never depend on who came
last, and the counter it uses is back at 0 afterwards. Letters: N lanes, G query heads per key head,
D head width, DV that of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moescope.kernels.triton_ops.attention_kernel import attend_kernel
from moescope.kernels.triton_ops.attention_rows import GATES, NORMS, ROPES
from moescope.kernels.triton_ops.gemv import launch

# Columns of a head, at most -> keys in a tile: keys and values are held while others come.
KEYS = ((128, 64), (256, 32), (1024, 16))
MAX_SPLITS = 32
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Shape:
    """What is fixed about an attention.

    `norm`: a key of `attention_rows.NORMS`; `norm_wide`: its weight is multiplied in float32.
    `rope` is half or interleaved, over the first `dims` columns; positions from `long_from` on are
    turned by the second half of the table. `gate` is sigmoid or softplus, of every column or of
    every head; `gate_in_row`: it stands behind each query. `value_norm`: of each head, no weight.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    value_dim: int = 0  # 0: head_dim
    window: int = 0
    chunk: int = 0
    clip: float | None = None
    softcap: float = 0.0
    norm: str = "none"
    norm_wide: bool = False
    q_eps: float = 0.0
    k_eps: float = 0.0
    value_norm: bool = False
    v_eps: float = 0.0
    value_scale: float = 1.0
    keys_are_values: bool = False
    rope: str = "none"
    dims: int = 0
    long_from: int = 0
    gate: str = "none"
    gate_of: str = "columns"  # or heads
    gate_in_row: bool = False

    @property
    def values(self) -> int:
        """Columns of a value."""
        return self.value_dim or self.head_dim

    def columns(self) -> dict[str, int]:
        """Where things are in a row of qkv."""
        query = self.head_dim * (2 if self.gate_in_row else 1)
        keys = self.heads * query
        values = keys if self.keys_are_values else keys + self.kv_heads * self.head_dim
        row = values + self.kv_heads * self.values
        return {"Q_STRIDE": query, "KEYS_AT": keys, "VALUES_AT": values, "ROW": row}

    def gates(self) -> dict[str, int]:
        """Where the numbers of a gate are."""
        width = self.values if self.gate_of == "columns" else 1
        row, head = self.heads * width, width
        if self.gate_in_row:
            row, head = self.columns()["ROW"], 2 * self.head_dim
        column = int(self.gate_of == "columns")
        return {"GATE_ROW": row, "GATE_HEAD": head, "GATE_COLUMN": column}


@dataclass(frozen=True, slots=True)
class Scratch:
    """Between the splits of one launch. Layers share it; launches on one stream follow each
    other."""

    splits: int
    parts: Tensor  # float32
    stats: Tensor  # float32
    counts: Tensor  # int32, 0 between launches

    @staticmethod
    def of(shapes: list[Shape], lanes: int, device: str, processors: int) -> Scratch:
        """Room for N lanes of the widest of `shapes`, in splits that give each processor one."""
        groups = lanes * max(shape.kv_heads for shape in shapes)
        fewest = lanes * min(shape.kv_heads for shape in shapes)
        splits = min(MAX_SPLITS, triton.next_power_of_2(max(1, processors // fewest)))
        heads = lanes * splits * max(shape.heads for shape in shapes)
        width = max(shape.values for shape in shapes)
        return Scratch(
            splits,
            torch.empty(heads * width, dtype=torch.float32, device=device),
            torch.empty(heads * 2, dtype=torch.float32, device=device),
            torch.zeros(groups, dtype=torch.int32, device=device),
        )


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Tensor,
    positions: Tensor,
    shape: Shape,
    scratch: Scratch,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    warmth: Tensor | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor,
    pdl: bool = False,
) -> Tensor:
    """Feed one token to N lanes: writes their rows of the cache and returns `out` [N, heads × DV].

    qkv [N, ROW] (see `Shape.columns`) and the cache, keys [lanes, kv heads, capacity, D] and values
    [.., DV], in the model's dtype; lanes and positions [N] int32 on the device; `weights` of the q
    and the k norm; `rotation` cos and signed sin [capacity, dims] in the dtype they are applied in,
    twice as many rows with `long_from`; `warmth` [capacity] float32 multiplies queries; `sinks`
    [heads]; `gate` [N, ..], by the way not needed where it stands in qkv; `pdl` as in `gemv`.
    """
    q_weight, k_weight = weights or (qkv, qkv)
    cos, sin = rotation or (qkv, qkv)
    constants = _constants(shape, scratch.splits, cos.dtype is torch.float32)
    scale = shape.scale / shape.softcap if shape.softcap else shape.scale * LOG2_E
    attend_kernel[(qkv.shape[0] * shape.kv_heads, scratch.splits)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        warmth,
        sinks,
        qkv[:, shape.head_dim :] if shape.gate_in_row else gate,
        keys,
        values,
        lanes,
        positions,
        scratch.parts,
        scratch.stats,
        scratch.counts,
        out,
        keys.shape[2],
        scale,
        shape.softcap * LOG2_E,
        shape.clip or 0.0,
        shape.q_eps,
        shape.k_eps,
        shape.v_eps,
        shape.value_scale,
        **constants,
        PDL=pdl,
        num_warps=4,
        **launch(pdl),
    )
    return out


def _constants(shape: Shape, splits: int, rope_wide: bool) -> dict[str, Any]:
    G, D, DV = shape.heads // shape.kv_heads, shape.head_dim, shape.values
    flat, widest = shape.norm == "flat", max(16, triton.next_power_of_2(max(D, DV)))
    return {
        "KV": shape.kv_heads,
        "G": G,
        "D": D,
        "DV": DV,
        "G_PAD": max(16, triton.next_power_of_2(G)) if G > 1 else 1,
        "D_PAD": max(16, triton.next_power_of_2(D)),
        "DV_PAD": max(16, triton.next_power_of_2(DV)),
        "Q_PAD": triton.next_power_of_2(shape.heads * D) if flat else 1,
        "K_PAD": triton.next_power_of_2(shape.kv_heads * D) if flat else 1,
        **shape.columns(),
        "DIMS": shape.dims,
        "LONG_FROM": shape.long_from,
        "WINDOW": shape.window,
        "CHUNK": shape.chunk,
        "SPLITS": splits,
        "BLOCK": block(widest),
        "NORM": NORMS[shape.norm],
        "NORM_WIDE": shape.norm_wide,
        "NORM_V": shape.value_norm,
        "CLIP": shape.clip is not None,
        "CAP": shape.softcap != 0.0,
        "SCALE_V": shape.value_scale != 1.0,
        "ROPE": ROPES[shape.rope],
        "ROPE_WIDE": rope_wide,
        "GATE": GATES[shape.gate],
        **shape.gates(),
        "DOT": G > 1,
    }


def block(width: int) -> int:
    """Keys in a tile, for heads of `width` columns."""
    return next(keys for widest, keys in KEYS if width <= widest)


_POINTERS = ("qkv", "q_weight", "k_weight", "cos", "sin", "all_keys", "all_values", "out")
_NUMBERS = ("scale", "cap", "clip", "q_eps", "k_eps", "v_eps", "value_scale")


def _case(dtype: str, splits: int, shape: Shape, **more: str) -> tuple[object, ...]:
    """`more`: types of pointers that are there."""
    types = dict.fromkeys(_POINTERS, f"*{dtype}") | dict.fromkeys(_NUMBERS, "fp32")
    types |= {"lanes": "*i32", "positions": "*i32", "counts": "*i32"}
    types |= {"parts": "*fp32", "stats": "*fp32", "capacity": "i32:16"} | more
    absent = dict.fromkeys({"warmth", "sinks", "gate"} - set(more))
    wide = types["cos"] == "*fp32"
    constants = {**_constants(shape, splits, wide), **absent, "PDL": False}
    return attend_kernel, types, constants, {"num_warps": 4}


_QWEN3 = Shape(32, 4, 128, 0.1, norm="per_head", rope="half", dims=128)
_FULL = Shape(16, 16, 128, 0.1, norm="flat", rope="half", dims=128, clip=8.0)
_EVERY = Shape(
    *(16, 2, 96, 0.1, 64),
    chunk=8192,
    softcap=30.0,
    norm="per_head_after",
    norm_wide=True,
    value_norm=True,
    value_scale=0.7,
    rope="interleaved",
    dims=32,
    long_from=4096,
    gate="softplus",
    gate_of="heads",
)
# OLMoE, Qwen3-30B-A3B, Gemma 4's full layers, everything at once, and narrow float32.
AOT = {
    "attend flat bf16": _case("bf16", 8, _FULL),
    "attend per head bf16": _case("bf16", 32, _QWEN3),
    "attend wide heads bf16": _case(
        *("bf16", 32),
        Shape(
            *(16, 2, 512, 1.0),
            norm="per_head",
            rope="half",
            dims=512,
            value_norm=True,
            keys_are_values=True,
        ),
    ),
    "attend everything fp16": _case(
        *("fp16", 32, _EVERY), warmth="*fp32", sinks="*fp16", gate="*fp16", cos="*fp32", sin="*fp32"
    ),
    "attend window fp32": _case("fp32", 4, Shape(4, 2, 24, 0.2, window=5, rope="half", dims=24)),
}
