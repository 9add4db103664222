"""Attention of one token in each of N lanes, in one launch: q and k norm, clip, rotation, the new
row of the cache, and softmax over the cache, split so that few heads fill the device.

Positions and lanes are read from device memory, so one launch serves every length. The splits of a
lane's key head merge in the last of them to finish, in a fixed order: sums never depend on who came
last, and the counter it uses is back at 0 afterwards. Letters: N lanes, G query heads per key head,
D head width, S keys in sight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moescope.kernels.triton_ops.gemv import launch

BLOCK = 64  # keys in a tile
MAX_SPLITS = 32
LOG2_E = 1.4426950408889634


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _flat_factor(row, width: tl.constexpr, PAD: tl.constexpr, eps):
    """1 / root mean square of `width` values."""
    i = tl.arange(0, PAD)
    x = tl.load(row + i, mask=i < width, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)


@triton.jit
def _prepared(x, factor, weight, clip, NORM: tl.constexpr, WIDE: tl.constexpr, CLIP: tl.constexpr,
              dtype: tl.constexpr):  # fmt: skip
    """Normed and clipped, rounded where the torch operators round."""
    if NORM:
        if WIDE:
            x = _rounded(x * factor * weight, dtype)
        else:
            x = _rounded(_rounded(x * factor, dtype) * weight, dtype)
    if CLIP:
        x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))  # a NaN stays one
    return x


@triton.jit
def _turned(x, partner, cos, sin, WIDE: tl.constexpr, dtype: tl.constexpr):
    """Rotated by halves; `partner` stands half a head away and `sin` carries its sign."""
    if WIDE:
        total = x * cos + partner * sin
    else:
        total = _rounded(x * cos, dtype) + _rounded(partner * sin, dtype)
    return _rounded(total, dtype)


@triton.jit
def _scores(q, k, DOT: tl.constexpr):
    """[G, D] and [B, D] -> [G, B]. Without DOT, G is 1."""
    if DOT:
        found = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
    else:
        found = tl.sum(k.to(tl.float32) * q, axis=1)[None, :]
    return found


@triton.jit
def _mixed(p, v, DOT: tl.constexpr):
    """[G, B] and [B, D] -> [G, D]. Without DOT, G is 1."""
    if DOT:
        found = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        found = tl.sum(tl.sum(p, axis=0)[:, None] * v.to(tl.float32), axis=0)[None, :]
    return found


@triton.jit
def _attend(
    qkv,  # [N, (KV × G + 2 × KV) × D]
    q_weight,  # [KV × G × D] where norms are flat, [D] where they are per head
    k_weight,
    cos,  # [capacity, D], of the dtype they are applied in
    sin,
    all_keys,  # [lanes, KV, capacity, D]
    all_values,
    lanes,  # [N] int32, which row of the cache
    positions,  # [N] int32, where the token stands
    parts,  # [N × KV, SPLITS, G, D] float32
    stats,  # [N × KV, SPLITS, G, 2] float32, maximum and sum
    counts,  # [N × KV] int32, 0 between launches
    out,  # [N, KV × G × D]
    capacity,
    scale,  # of scores, × log2 e
    clip,
    q_eps,
    k_eps,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    Q_PAD: tl.constexpr,  # of KV × G × D, where norms are flat
    K_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    NORM: tl.constexpr,
    NORM_WIDE: tl.constexpr,
    CLIP: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = qkv.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    n, head = group // KV, group % KV
    position = tl.load(positions + n)
    first = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    blocks = tl.cdiv(position - first, BLOCK)  # of cached keys; the new one is in registers
    share = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    active = tl.maximum(tl.cdiv(blocks, share), 1)
    if split >= active:
        return

    rows, d = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    other = tl.where(d >= D // 2, d - D // 2, d + D // 2)
    in_d = d < D
    in_q = (rows < G)[:, None] & in_d[None, :]
    row = qkv + n * ((G + 2) * KV * D)
    turn = position * D + d
    if ROPE:
        c = tl.load(cos + turn, mask=in_d, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=in_d, other=0.0).to(tl.float32)

    # The queries of this key head.
    at = (head * G + rows)[:, None] * D
    q = tl.load(row + at + d[None, :], mask=in_q, other=0.0).to(tl.float32)
    factor, weight, weight_other = 1.0, 1.0, 1.0
    if NORM:
        if FLAT:
            factor = _flat_factor(row, G * KV * D, Q_PAD, q_eps)
            weight = tl.load(q_weight + at + d[None, :], mask=in_q, other=0.0).to(tl.float32)
            weight_other = tl.load(q_weight + at + other[None, :], mask=in_q, other=0.0)
        else:
            factor = tl.rsqrt(tl.sum(q * q, axis=1) / D + q_eps)[:, None]
            weight = tl.load(q_weight + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
            weight_other = tl.load(q_weight + other, mask=in_d, other=0.0)[None, :]
        weight_other = weight_other.to(tl.float32)
    q = _prepared(q, factor, weight, clip, NORM, NORM_WIDE, CLIP, dtype)
    if ROPE:
        partner = tl.load(row + at + other[None, :], mask=in_q, other=0.0).to(tl.float32)
        partner = _prepared(partner, factor, weight_other, clip, NORM, NORM_WIDE, CLIP, dtype)
        q = _turned(q, partner, c[None, :], s[None, :], ROPE_WIDE, dtype)

    lane = tl.load(lanes + n).to(tl.int64)
    keys = all_keys + (lane * KV + head) * capacity * D
    values = all_values + (lane * KV + head) * capacity * D
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, D_PAD], tl.float32)
    if split == 0:  # the new key and value: into the cache, and seen from here
        own = G * KV * D + head * D
        new_k = tl.load(row + own + d, mask=in_d, other=0.0).to(tl.float32)
        new_v = tl.load(row + own + KV * D + d, mask=in_d, other=0.0).to(tl.float32)
        k_factor, here, there = 1.0, 1.0, 1.0
        if NORM:
            if FLAT:
                k_factor = _flat_factor(row + G * KV * D, KV * D, K_PAD, k_eps)
                k_weights = k_weight + head * D
            else:
                k_factor = tl.rsqrt(tl.sum(new_k * new_k, axis=0) / D + k_eps)
                k_weights = k_weight
            here = tl.load(k_weights + d, mask=in_d, other=0.0).to(tl.float32)
            there = tl.load(k_weights + other, mask=in_d, other=0.0).to(tl.float32)
        new_k = _prepared(new_k, k_factor, here, clip, NORM, NORM_WIDE, CLIP, dtype)
        if ROPE:
            k_partner = tl.load(row + own + other, mask=in_d, other=0.0).to(tl.float32)
            k_partner = _prepared(k_partner, k_factor, there, clip, NORM, NORM_WIDE, CLIP, dtype)
            new_k = _turned(new_k, k_partner, c, s, ROPE_WIDE, dtype)
        new_v = _prepared(new_v, 1.0, 1.0, clip, False, False, CLIP, dtype)
        place = position.to(tl.int64) * D + d
        tl.store(keys + place, new_k.to(dtype), mask=in_d)
        tl.store(values + place, new_v.to(dtype), mask=in_d)
        top = tl.sum(q * new_k[None, :], axis=1) * scale
        total = tl.full([G_PAD], 1.0, tl.float32) + 0.0 * top  # NaN where the score is
        acc = total[:, None] * new_v[None, :]

    j = tl.arange(0, BLOCK)
    end = tl.minimum((split + 1) * share, blocks)
    for b in range(split * share, end):
        at_key = first + b * BLOCK + j
        in_sight = at_key < position
        places = at_key.to(tl.int64)[:, None] * D + d[None, :]
        seen = in_sight[:, None] & in_d[None, :]
        k = tl.load(keys + places, mask=seen, other=0.0)
        v = tl.load(values + places, mask=seen, other=0.0)
        scores = tl.where(in_sight[None, :], _scores(q, k, DOT) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None] + _mixed(p, v, DOT)
        top = higher

    to = out + n * (KV * G * D) + at
    if active == 1:
        tl.store(to + d[None, :], (acc / total[:, None]).to(dtype), mask=in_q)
        return
    base = (group * SPLITS + split) * G + rows
    tl.store(parts + base[:, None] * D + d[None, :], acc, mask=in_q)
    tl.store(stats + base * 2, top, mask=rows < G)
    tl.store(stats + base * 2 + 1, total, mask=rows < G)
    tl.debug_barrier()
    arrived = tl.atomic_add(counts + group, 1, sem="acq_rel")
    if arrived != active - 1:
        return
    tl.store(counts + group, 0)
    every = tl.arange(0, SPLITS)
    begun = every < active
    for g in tl.static_range(G):
        base = (group * SPLITS + every) * G + g
        tops = tl.load(stats + base * 2, mask=begun, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + base * 2 + 1, mask=begun, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts + base[:, None] * D + d[None, :],
            mask=begun[:, None] & in_d[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        fades = tl.exp2(tops - tl.max(tops, axis=0))
        mixed = tl.sum(part * fades[:, None], axis=0) / tl.sum(totals * fades, axis=0)
        tl.store(out + n * (KV * G * D) + (head * G + g) * D + d, mixed.to(dtype), mask=in_d)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is fixed about an attention. `norm` is none, flat or per_head; `norm_wide`: the weight
    is multiplied in float32."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    clip: float | None = None
    norm: str = "none"
    norm_wide: bool = False
    q_eps: float = 0.0
    k_eps: float = 0.0


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
        width = max(shape.head_dim for shape in shapes)
        return Scratch(
            splits,
            torch.empty(heads * width, dtype=torch.float32, device=device),
            torch.empty(heads * 2, dtype=torch.float32, device=device),
            torch.zeros(groups, dtype=torch.int32, device=device),
        )


def attend(
    qkv: Tensor,
    cache: Tensor,
    lanes: Tensor,
    positions: Tensor,
    shape: Shape,
    scratch: Scratch,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    out: Tensor,
    pdl: bool = False,
) -> Tensor:
    """Feed one token to N lanes: writes their rows of `cache` and returns `out` [N, heads × D].

    qkv [N, (heads + 2 kv heads) × D] and cache [2, lanes, kv heads, capacity, D] in the model's
    dtype; lanes and positions [N] int32 on the device; `weights` of the q and the k norm;
    `rotation` cos and signed sin [capacity, D] in the dtype they are applied in; `pdl` as in
    `gemv`.
    """
    G, D = shape.heads // shape.kv_heads, shape.head_dim
    flat = shape.norm == "flat"
    q_weight, k_weight = weights or (qkv, qkv)
    cos, sin = rotation or (qkv, qkv)
    dot = G > 1
    _attend[(qkv.shape[0] * shape.kv_heads, scratch.splits)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        cache[0],
        cache[1],
        lanes,
        positions,
        scratch.parts,
        scratch.stats,
        scratch.counts,
        out,
        cache.shape[3],
        shape.scale * LOG2_E,
        shape.clip or 0.0,
        shape.q_eps,
        shape.k_eps,
        KV=shape.kv_heads,
        G=G,
        D=D,
        G_PAD=max(16, triton.next_power_of_2(G)) if dot else 1,
        D_PAD=max(16, triton.next_power_of_2(D)),
        Q_PAD=triton.next_power_of_2(shape.heads * D) if flat else 1,
        K_PAD=triton.next_power_of_2(shape.kv_heads * D) if flat else 1,
        WINDOW=shape.window,
        SPLITS=scratch.splits,
        BLOCK=BLOCK,
        FLAT=flat,
        NORM=shape.norm != "none",
        NORM_WIDE=shape.norm_wide,
        CLIP=shape.clip is not None,
        ROPE=rotation is not None,
        ROPE_WIDE=cos.dtype is torch.float32,
        DOT=dot,
        PDL=pdl,
        num_warps=4,
        **launch(pdl),
    )
    return out


def _case(dtype: str, **constexprs: object) -> tuple[object, ...]:
    types = {name: f"*{dtype}" for name in ("qkv", "q_weight", "k_weight", "cos", "sin")}
    types |= {name: f"*{dtype}" for name in ("all_keys", "all_values", "out")}
    types |= {"lanes": "*i32", "positions": "*i32", "counts": "*i32"}
    types |= {"parts": "*fp32", "stats": "*fp32", "capacity": "i32:16"}
    types |= {name: "fp32" for name in ("scale", "clip", "q_eps", "k_eps")}
    plain = {
        "PDL": False,
        "Q_PAD": 1,
        "K_PAD": 1,
        "WINDOW": 0,
        "BLOCK": BLOCK,
        "FLAT": False,
        "NORM": False,
    }
    plain |= {"NORM_WIDE": False, "CLIP": False, "ROPE": True, "ROPE_WIDE": False}
    return _attend, types, {**plain, **constexprs}, {"num_warps": 4}


# OLMoE, Qwen3-30B-A3B, and a narrow float32 model with a window.
AOT = {
    "attend flat bf16": _case(
        "bf16", KV=16, G=1, D=128, G_PAD=1, D_PAD=128, SPLITS=8, DOT=False,
        NORM=True, FLAT=True, Q_PAD=2048, K_PAD=2048, CLIP=True,
    ),
    "attend per head bf16": _case(
        "bf16", KV=4, G=8, D=128, G_PAD=16, D_PAD=128, SPLITS=32, DOT=True, NORM=True,
    ),
    "attend window fp32": _case(
        "fp32", KV=2, G=2, D=24, G_PAD=16, D_PAD=32, SPLITS=4, DOT=True, WINDOW=5,
    ),
}  # fmt: skip
