"""The two kernels of `experts.experts_small`, which says what they have in common: gate-up with the
activation, and down with the sum of the experts and what follows it."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moescope.kernels.triton_ops.gating import activated, gated
from moescope.kernels.triton_ops.gemv import input_row, products, rounded, weight_rows
from moescope.kernels.triton_ops.picks import all_picks, choosers, combine_weight, null_share


@triton.jit
def gate_up_kernel(
    h,
    weight,
    bias,
    norm,
    ids,
    weights,
    inner,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    EPS: tl.constexpr,
    APPLIES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    ON_INPUT: tl.constexpr,
    COMBINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PICKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """inner [experts met, N, I] = activation(gate) × up, for the lanes that chose the expert."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    picks = all_picks(ids, stride, N, K, E, SLOTS)
    expert = tl.min(picks)
    if N == 1:
        alone = input_row(h, 0, norm, EPS, APPLIES, H, BLOCK)
    HALVES: tl.constexpr = 2 if GLU else 1
    at = weight + expert.to(tl.int64) * (HALVES * INNER * H)
    gate_tile = weight_rows(at, first, INNER, H, ROWS, BLOCK, expert < E)
    up_tile = gate_tile
    if GLU:
        up_tile = weight_rows(at + INNER * H, first, INNER, H, ROWS, BLOCK, expert < E)
    met = 0
    while expert < E:
        following = tl.min(tl.where(picks > expert, picks, E))
        at = weight + following.to(tl.int64) * (HALVES * INNER * H)
        next_gate = weight_rows(at, first, INNER, H, ROWS, BLOCK, following < E)
        next_up = next_gate
        if GLU:
            next_up = weight_rows(at + INNER * H, first, INNER, H, ROWS, BLOCK, following < E)
        chosen = choosers(picks, expert, ids, N, K, SLOTS)
        for n in range(N):
            if N == 1 or (chosen >> (8 * n)) & 255 > 0:
                row = alone if N == 1 else input_row(h, n, norm, EPS, APPLIES, H, BLOCK)
                if ON_INPUT:
                    scale = combine_weight(ids, weights, n, stride, expert, COMBINE, K, PICKS)
                    row = rounded(row * scale, h)
                by = expert.to(tl.int64) * (HALVES * INNER) + rows
                gate = products(gate_tile, row)
                if bias is not None:
                    gate += tl.load(bias + by, mask=rows < INNER, other=0.0).to(tl.float32)
                if GLU:
                    up = products(up_tile, row)
                    if bias is not None:
                        by += INNER
                        up += tl.load(bias + by, mask=rows < INNER, other=0.0).to(tl.float32)
                    y = gated(gate, up, h, ACTIVATION, LIMIT, LIMIT_AFTER, ALPHA, UP_SHIFT)
                else:
                    y = activated(rounded(gate, h), h, ACTIVATION, ALPHA)
                tl.store(inner + (met * N + n) * INNER + rows, y, mask=rows < INNER)
        gate_tile, up_tile = next_gate, next_up
        expert = following
        met += 1


@triton.jit
def down_kernel(
    inner,
    weight,
    bias,
    ids,
    weights,
    passed,
    output_scale,
    output_bias,
    shared,
    residual,
    out,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    AVERAGE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    COMBINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PICKS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [N, H] = Σ over experts of weight × (inner times the expert's down), and what follows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[:, None]
    picks = all_picks(ids, stride, N, K, E, SLOTS)
    expert = tl.min(picks)
    at = weight + expert.to(tl.int64) * (H * INNER)
    tile = weight_rows(at, first, H, INNER, ROWS, BLOCK, expert < E)
    total = tl.zeros([LANES, ROWS], tl.float32)
    met = 0
    while expert < E:
        following = tl.min(tl.where(picks > expert, picks, E))
        at = weight + following.to(tl.int64) * (H * INNER)
        next_tile = weight_rows(at, first, H, INNER, ROWS, BLOCK, following < E)
        chosen = choosers(picks, expert, ids, N, K, SLOTS)
        for n in range(N):
            if N == 1 or (chosen >> (8 * n)) & 255 > 0:
                part = products(tile, input_row(inner, met * N + n, None, 0.0, "", INNER, BLOCK))
                if bias is not None:
                    by = bias + expert.to(tl.int64) * H + rows
                    part += tl.load(by, mask=rows < H, other=0.0).to(tl.float32)
                part = rounded(part, out)
                if not ON_INPUT:
                    scale = combine_weight(ids, weights, n, stride, expert, COMBINE, K, PICKS)
                    part = rounded(part * scale, out)
                total = tl.where(lanes == n, rounded(total + part[None, :], out), total)
        tile = next_tile
        expert = following
        met += 1
    places = lanes * H + rows[None, :]
    there = (lanes < N) & (rows < H)[None, :]
    if passed is not None:
        share = null_share(ids, weights, lanes, stride, N, K, E, PICKS)
        extra = tl.load(passed + places, mask=there, other=0.0).to(tl.float32)
        total = rounded(total + rounded(share * extra, out), out)
    if output_scale is not None:
        by = tl.load(output_scale + lanes, mask=lanes < N, other=1.0)
        total = rounded(total * by, out)
    if output_bias is not None:
        by = tl.load(output_bias + rows, mask=rows < H, other=0.0).to(tl.float32)
        total = rounded(total + by[None, :], out)
    if shared is not None:
        extra = tl.load(shared + places, mask=there, other=0.0).to(tl.float32)
        total = rounded(total + extra, out)
    if AVERAGE:
        total = rounded(total * 0.5, out)
    if MULTIPLIER != 1.0:
        total = rounded(total * MULTIPLIER, out)
    if residual is not None:
        held = tl.load(residual + places, mask=there, other=0.0).to(tl.float32)
        total = rounded(held + total, out)
    tl.store(out + places, total, mask=there)
