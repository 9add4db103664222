"""The kernel of `attention.attend`: one token of N lanes, from its row of qkv to the heads' output.

Splits of a lane's key head each take a share of its cached keys. The last of them to finish merges
all. Letters: N lanes, G query heads per key head, D head width, DV that of values, S keys in sight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moescope.kernels.triton_ops.attention_rows import (
    FLAT,
    clipped,
    flat_factor,
    opened,
    partners,
    placed,
    rounded_to,
    scaled,
    unit_rows,
)


@triton.jit
def scores_of(q, k, DOT: tl.constexpr):
    """[G, D] and [B, D] -> [G, B]. Without DOT, G is 1."""
    if DOT:
        found = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
    else:
        found = tl.sum(k.to(tl.float32) * q, axis=1)[None, :]
    return found


@triton.jit
def mixed_values(p, v, DOT: tl.constexpr):
    """[G, B] and [B, D] -> [G, D]. Without DOT, G is 1."""
    if DOT:
        found = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        found = tl.sum(tl.sum(p, axis=0)[:, None] * v.to(tl.float32), axis=0)[None, :]
    return found


@triton.jit
def attend_kernel(
    qkv,  # [N, ROW]: queries, keys, values; a key may be the value too
    q_weight,  # [heads × D] where norms are flat, [D] where they are per head
    k_weight,
    cos,  # [capacity, DIMS], of the dtype they are applied in; then another for long lanes
    sin,
    warmth,  # [capacity] float32, what queries are multiplied by, or None
    sinks,  # [heads], or None
    gate,  # [N, ..], or None
    all_keys,  # [lanes, KV, capacity, D]
    all_values,  # [lanes, KV, capacity, DV]
    lanes,  # [N] int32, which row of the cache
    positions,  # [N] int32, where the token stands
    parts,  # [N × KV, SPLITS, G, DV] float32
    stats,  # [N × KV, SPLITS, G, 2] float32, maximum and sum
    counts,  # [N × KV] int32, 0 between launches
    out,  # [N, heads × DV]
    capacity,
    scale,  # see `scaled`
    cap,
    clip,
    q_eps,
    k_eps,
    v_eps,
    value_scale,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    Q_PAD: tl.constexpr,  # of heads × D, where norms are flat
    K_PAD: tl.constexpr,
    Q_STRIDE: tl.constexpr,  # columns from one query to the next
    KEYS_AT: tl.constexpr,  # the column of the first key
    VALUES_AT: tl.constexpr,
    ROW: tl.constexpr,
    DIMS: tl.constexpr,  # columns of a head that are turned
    LONG_FROM: tl.constexpr,  # positions from which on the second table turns; 0: none
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    NORM_WIDE: tl.constexpr,
    NORM_V: tl.constexpr,
    CLIP: tl.constexpr,
    CAP: tl.constexpr,
    SCALE_V: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
    GATE: tl.constexpr,
    GATE_ROW: tl.constexpr,  # numbers from one lane's gates to the next lane's
    GATE_HEAD: tl.constexpr,  # and from one head's to the next head's
    GATE_COLUMN: tl.constexpr,  # 0: a head has one
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
    first = 0
    if WINDOW:
        first = tl.maximum(position + 1 - WINDOW, 0)
    if CHUNK:
        first = position // CHUNK * CHUNK
    blocks = tl.cdiv(position - first, BLOCK)  # of cached keys; the new one is in registers
    share = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    active = tl.maximum(tl.cdiv(blocks, share), 1)
    if split >= active:
        return

    rows, d, dv = tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    in_d, in_dv = d < D, dv < DV
    row = qkv + n * ROW
    other, c, s = d, 1.0, 0.0
    if ROPE != 0:
        other = partners(d, DIMS, ROPE)
        place = position
        if LONG_FROM:
            place += tl.where(position >= LONG_FROM, capacity, 0)
        turn = place.to(tl.int64) * DIMS + d
        c = tl.load(cos + turn, mask=d < DIMS, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + turn, mask=d < DIMS, other=0.0).to(tl.float32)[None, :]

    # The queries of this key head.
    heads = (head * G + rows)[:, None]
    held = (rows < G)[:, None]
    q_factor = 1.0
    if NORM == FLAT:
        q_factor = flat_factor(row, G * KV * D, Q_PAD, q_eps)
    q = placed(
        *(
            row,
            heads * Q_STRIDE,
            held,
            q_factor,
            q_weight,
            heads * D if NORM == FLAT else heads * 0,
        ),
        *(d, other, c, s, clip, q_eps, D, DIMS, NORM, NORM_WIDE, CLIP, ROPE, ROPE_WIDE, dtype),
    )
    if warmth is not None:
        q = rounded_to(q * tl.load(warmth + position), dtype)

    lane = tl.load(lanes + n).to(tl.int64)
    keys = all_keys + (lane * KV + head) * capacity * D
    values = all_values + (lane * KV + head) * capacity * DV
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV_PAD], tl.float32)
    if split == 0:  # the new key and value: into the cache, and seen from here
        one = tl.zeros([1, 1], tl.int32) + head
        k_factor = 1.0
        if NORM == FLAT:
            k_factor = flat_factor(row + KEYS_AT, KV * D, K_PAD, k_eps)
        new_k = placed(
            *(
                row + KEYS_AT,
                one * D,
                one >= 0,
                k_factor,
                k_weight,
                one * D if NORM == FLAT else one * 0,
            ),
            *(d, other, c, s, clip, k_eps, D, DIMS, NORM, NORM_WIDE, CLIP, ROPE, ROPE_WIDE, dtype),
        )
        new_v = tl.load(row + VALUES_AT + head * DV + dv, mask=in_dv, other=0.0).to(tl.float32)
        new_v = clipped(new_v, clip, CLIP)
        if NORM_V:
            new_v = unit_rows(new_v, v_eps, DV, dtype)
        if SCALE_V:
            new_v = rounded_to(new_v * value_scale, dtype)
        at = position.to(tl.int64)
        tl.store(keys + at * D + d[None, :], new_k.to(dtype), mask=in_d[None, :])
        tl.store(values + at * DV + dv, new_v.to(dtype), mask=in_dv)
        top = scaled(tl.sum(q * new_k, axis=1), scale, cap, CAP)
        total = tl.full([G_PAD], 1.0, tl.float32) + 0.0 * top  # NaN where the score is
        acc = total[:, None] * new_v[None, :]
        if sinks is not None:
            sink = tl.load(sinks + head * G + rows, mask=rows < G, other=0.0).to(tl.float32)
            sink = sink * 1.4426950408889634
            higher = tl.maximum(top, sink)
            fade = tl.exp2(top - higher)
            total = total * fade + tl.exp2(sink - higher)
            acc = acc * fade[:, None]
            top = higher

    j = tl.arange(0, BLOCK)
    end = tl.minimum((split + 1) * share, blocks)
    for b in range(split * share, end):
        at_key = first + b * BLOCK + j
        in_sight = at_key < position
        at_key = at_key.to(tl.int64)[:, None]
        seen = in_sight[:, None]
        k = tl.load(keys + at_key * D + d[None, :], mask=seen & in_d[None, :], other=0.0)
        v = tl.load(values + at_key * DV + dv[None, :], mask=seen & in_dv[None, :], other=0.0)
        scores = scaled(scores_of(q, k, DOT), scale, cap, CAP)
        scores = tl.where(in_sight[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None] + mixed_values(p, v, DOT)
        top = higher

    to = out + n * (KV * G * DV)
    if active == 1:
        mask = held & in_dv[None, :]
        mixed = acc / total[:, None]
        if GATE != 0:
            by = n * GATE_ROW + heads * GATE_HEAD + dv[None, :] * GATE_COLUMN
            mixed = opened(mixed, gate, by, mask, GATE, dtype)
        tl.store(to + heads * DV + dv[None, :], mixed.to(dtype), mask=mask)
        return
    base = (group * SPLITS + split) * G + rows
    tl.store(parts + base[:, None] * DV + dv[None, :], acc, mask=held & in_dv[None, :])
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
            parts + base[:, None] * DV + dv[None, :],
            mask=begun[:, None] & in_dv[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        fades = tl.exp2(tops - tl.max(tops, axis=0))
        mixed = tl.sum(part * fades[:, None], axis=0) / tl.sum(totals * fades, axis=0)
        if GATE != 0:
            by = n * GATE_ROW + (head * G + g) * GATE_HEAD + dv * GATE_COLUMN
            mixed = opened(mixed, gate, by, in_dv, GATE, dtype)
        tl.store(to + (head * G + g) * DV + dv, mixed.to(dtype), mask=in_dv)
