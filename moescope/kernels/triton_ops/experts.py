"""The routed experts for one token of each of a few lanes: `experts_small`, in two launches.

Both kernels give a program some rows of *every* expert and let it walk over the distinct experts
that any lane chose, in ascending id. So each distinct expert is read once for all lanes, in place;
the grid depends on the widths alone (a captured graph stays valid, unused picks cost nothing, and
every program has the same work); and the second kernel, having all parts of its outputs in the
order in which they are to be added, needs neither atomics nor a pass to merge them. While one
expert is multiplied, the rows of the next are on their way. Rounding points and order are those of
`torch_operators.TorchExperts`.

The walk numbers the experts it meets, and inner activations are stored under that number, so the
two kernels agree on it without a list between them.

A dense gated block is one expert that every lane chose: `mlp_small`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moescope.kernels.triton_ops.gemv import (
    check_products,
    input_row,
    launch,
    products,
    rounded,
    weight_rows,
)
from moescope.kernels.triton_ops.tiles import WIDEST, ExpertTiles, Tile, expert_tiles

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
COMBINES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-2 * inner))  # x × (1 + tanh(inner)) / 2


@triton.jit
def all_picks(ids, stride, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr):
    """What the lanes chose, as [SLOTS]; E where a slot is unused or its expert is a null one."""
    slot = tl.arange(0, SLOTS)
    if ids is None:
        picks = slot * E  # expert 0 and unused picks
    else:
        found = tl.load(ids + (slot // K) * stride + slot % K, mask=slot < N * K, other=-1)
        picks = tl.where((found >= 0) & (found < E), found, E)
    return picks


@triton.jit
def choosers(picks, expert, ids, N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr):
    """How often each lane chose the expert, lane n in byte n of an int64."""
    if ids is None:
        chosen = tl.full([], 0x0101010101010101, tl.int64)
    else:
        lane = (tl.arange(0, SLOTS) // K) % N  # slots beyond the last lane hold no expert
        one = tl.full([SLOTS], 1, tl.int64) << (8 * lane).to(tl.int64)
        chosen = tl.sum(tl.where(picks == expert, one, 0))
    return chosen


@triton.jit
def combine_weight(
    ids, weights, n, stride, expert, COMBINE: tl.constexpr, K: tl.constexpr, PICKS: tl.constexpr
):
    """Lane n's weight for the expert, rounded to the combine dtype."""
    if ids is None:
        weight = tl.full([], 1.0, tl.float32)
    else:
        pick = tl.arange(0, PICKS)
        here = tl.load(ids + n * stride + pick, mask=pick < K, other=-1) == expert
        found = tl.load(weights + n * stride + pick, mask=here & (pick < K), other=0.0)
        weight = tl.sum(found).to(COMBINE).to(tl.float32)
    return weight


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
    at = weight + expert.to(tl.int64) * (2 * INNER * H)
    gate_tile = weight_rows(at, first, INNER, H, ROWS, BLOCK, expert < E)
    up_tile = weight_rows(at + INNER * H, first, INNER, H, ROWS, BLOCK, expert < E)
    met = 0
    while expert < E:
        following = tl.min(tl.where(picks > expert, picks, E))
        at = weight + following.to(tl.int64) * (2 * INNER * H)
        next_gate = weight_rows(at, first, INNER, H, ROWS, BLOCK, following < E)
        next_up = weight_rows(at + INNER * H, first, INNER, H, ROWS, BLOCK, following < E)
        chosen = choosers(picks, expert, ids, N, K, SLOTS)
        for n in range(N):
            if N == 1 or (chosen >> (8 * n)) & 255 > 0:
                row = alone if N == 1 else input_row(h, n, norm, EPS, APPLIES, H, BLOCK)
                if ON_INPUT:
                    scale = combine_weight(ids, weights, n, stride, expert, COMBINE, K, PICKS)
                    row = rounded(row * scale, h)
                gate = products(gate_tile, row)
                up = products(up_tile, row)
                if bias is not None:
                    by = bias + expert.to(tl.int64) * (2 * INNER) + rows
                    gate += tl.load(by, mask=rows < INNER, other=0.0).to(tl.float32)
                    up += tl.load(by + INNER, mask=rows < INNER, other=0.0).to(tl.float32)
                gate = rounded(activated(rounded(gate, h), ACTIVATION), h)
                y = gate * rounded(up, h)
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
    output_scale,
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
    if output_scale is not None:
        by = tl.load(output_scale + lanes, mask=lanes < N, other=1.0)
        total = rounded(total * by, out)
    if shared is not None:
        extra = tl.load(shared + places, mask=there, other=0.0).to(tl.float32)
        total = rounded(total + extra, out)
    if MULTIPLIER != 1.0:
        total = rounded(total * MULTIPLIER, out)
    if residual is not None:
        held = tl.load(residual + places, mask=there, other=0.0).to(tl.float32)
        total = rounded(held + total, out)
    tl.store(out + places, total, mask=there)


def experts_small(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor | None,
    weights: Tensor | None,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_on_input: bool = False,
    combine_dtype: torch.dtype = torch.float32,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    applies: str = "model",
    output_scale: Tensor | None = None,
    shared: Tensor | None = None,
    multiplier: float = 1.0,
    residual: Tensor | None = None,
    inner: Tensor | None = None,
    out: Tensor | None = None,
    tiles: ExpertTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """h [N, H] through the experts each lane chose: [N, H] in its dtype, N from 1 to 8.

    gate_up [E, 2I, H] (rows of gate, then of up), down [E, H, I], biases [E, 2I] and [E, H].
    expert_ids int32 and weights float32 [N, K], rows equally far apart: -1 is an unused pick, ids
    from E on are null experts, a lane's ids are distinct (weights of equal ones are added first).
    Without them every lane takes expert 0 with weight 1.

    `norm` [H] normalises h first. What follows the sum, each step rounded: times `output_scale`
    float32 [N], plus `shared` [N, H], times `multiplier`, plus `residual` [N, H], which `out` may
    be. `inner` is scratch of `inner_shape` in h's dtype.
    """
    N, H = h.shape
    E, _, width = down.shape
    check_products(h, gate_up, down, norm, gate_up_bias, down_bias, output_scale, shared, residual)
    assert width <= WIDEST and activation in ACTIVATIONS
    K, stride = (1, 1) if expert_ids is None else (expert_ids.shape[1], expert_ids.stride(0))
    if expert_ids is not None:
        assert K <= 32
        assert weights.stride() == expert_ids.stride() == (stride, 1)
    shape = inner_shape(N, K, E, width)
    inner = torch.empty(shape, dtype=h.dtype, device=h.device) if inner is None else inner
    assert inner.is_contiguous() and inner.numel() >= shape[0] * N * width
    out = torch.empty_like(h) if out is None else out
    tiles = tiles or expert_tiles(H, width)
    common = {
        "N": N,
        "K": K,
        "E": E,
        "H": H,
        "INNER": width,
        "ON_INPUT": weight_on_input,
        "COMBINE": COMBINES[combine_dtype],
        "PDL": pdl,
        **launch(pdl),
    }
    gate_up_kernel[(triton.cdiv(width, tiles.gate_up.rows),)](
        h,
        gate_up,
        gate_up_bias,
        norm,
        expert_ids,
        weights,
        inner,
        stride,
        EPS=eps,
        APPLIES=applies,
        ACTIVATION=activation,
        **common,
        **_blocks(tiles.gate_up, H, N, K),
        num_warps=tiles.gate_up.warps,
    )
    down_kernel[(triton.cdiv(H, tiles.down.rows),)](
        inner,
        down,
        down_bias,
        expert_ids,
        weights,
        output_scale,
        shared,
        residual,
        out,
        stride,
        MULTIPLIER=multiplier,
        **common,
        **_blocks(tiles.down, width, N, K),
        LANES=triton.next_power_of_2(N),
        num_warps=tiles.down.warps,
    )
    return out


def mlp_small(x: Tensor, gate_up: Tensor, down: Tensor, **options: Any) -> Tensor:
    """x [N, H] through a dense gated block, gate_up [2I, H] and down [H, I]: [N, H]. The options
    are those of `experts_small`."""
    return experts_small(x, gate_up[None], down[None], None, None, **options)


def inner_shape(N: int, K: int, E: int, width: int) -> tuple[int, int, int]:
    """Of the scratch between the two kernels: as many experts as N lanes of K picks can differ."""
    return min(N * K, E), N, width


def _blocks(tile: Tile, width: int, N: int, K: int) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "BLOCK": triton.next_power_of_2(width),
        "SLOTS": triton.next_power_of_2(N * K),
        "PICKS": triton.next_power_of_2(K),
    }


def _aot(dtype: str, N: int, K: int, E: int, H: int, width: int, **more: Any) -> tuple[tuple, ...]:
    """Both kernels as `experts_small` would launch them; `more` overrides: values of constexprs,
    and `dtype` for a pointer that is there."""
    tiles = expert_tiles(H, width)
    common = {"N": N, "K": K, "E": E, "H": H, "INNER": width, "COMBINE": tl.float32}
    fixed = common | {"ON_INPUT": False, "PDL": False}
    routes = {"ids": "*i32", "weights": "*fp32", "stride": "i32"}
    gate_up = dict.fromkeys(("h", "weight", "inner"), dtype) | routes
    gate_up |= {"bias": None, "norm": None, "EPS": 1e-5, "APPLIES": "model", "ACTIVATION": "silu"}
    down = dict.fromkeys(("inner", "weight", "out", "residual"), dtype) | routes
    down |= {"bias": None, "output_scale": None, "shared": None, "MULTIPLIER": 1.0}
    down["LANES"] = triton.next_power_of_2(N)
    cases = []
    for kernel, given, tile, wide in (
        (gate_up_kernel, gate_up, tiles.gate_up, H),
        (down_kernel, down, tiles.down, width),
    ):
        every = given | fixed | _blocks(tile, wide, N, K)
        every |= {name: value for name, value in more.items() if name in every}
        types = {n: v for n, v in every.items() if isinstance(v, str) and n.islower()}
        values = {n: v for n, v in every.items() if n not in types}
        cases.append((kernel, types, values, {"num_warps": tile.warps}))
    return tuple(cases)


_CASES = {
    "OLMoE": _aot("*bf16", 1, 32, 64, 2048, 1024),
    "OLMoE, 4 lanes": _aot("*bf16", 4, 32, 64, 2048, 1024),
    "Qwen3-30B": _aot("*bf16", 1, 32, 128, 2048, 768),
    "Qwen3-30B, 8 lanes": _aot("*bf16", 8, 32, 128, 2048, 768),
    "7168 columns": _aot("*bf16", 1, 32, 256, 7168, 2048),
    "everything, 3 lanes": _aot(
        *("*fp16", 3, 20, 60, 2048, 1408),
        ON_INPUT=True,
        COMBINE=tl.float16,
        MULTIPLIER=0.5,
        bias="*fp16",
        shared="*fp16",
        output_scale="*fp32",
    ),
    "dense, 2 lanes": _aot(
        *("*bf16", 2, 1, 1, 2048, 6144), norm="*bf16", ids=None, weights=None, ACTIVATION="gelu"
    ),
}
AOT = {
    f"{part}, {name}": case
    for name, pair in _CASES.items()
    for part, case in zip(("gate-up", "down"), pair, strict=True)
}
