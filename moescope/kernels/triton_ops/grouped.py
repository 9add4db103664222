"""The routed experts of a prompt: `experts_grouped`, grouped products over rows sorted by expert.

Rows are sorted, and where each expert's rows end is found, on the device; nothing waits for the
host. The products are torch's own grouped ones where it has a kernel for them (bfloat16, CUDA
devices of compute capability 9.0 and above), else the one here: a program finds its expert from
the ends, gathers its rows while it multiplies, and applies the activation before it stores. Parts
are then scaled and added in ascending expert id by one program a row, so sums are the same in every
run. Rounding points are those of `torch_operators.TorchExperts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moescope.kernels.triton_ops.experts import COMBINES
from moescope.kernels.triton_ops.gating import gated
from moescope.kernels.triton_ops.gemv import rounded
from moescope.kernels.triton_ops.tiles import Block, grouped_block

TORCH_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@triton.jit
def expert_of(tile, ends, E: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr):
    """The expert whose rows tile number `tile` holds (E beyond the last), its first row and the end
    of the expert's rows. Each expert has whole tiles of M rows."""
    number = tl.arange(0, EXPERTS)
    end = tl.load(ends + number, mask=number < E, other=0)
    start = tl.load(ends + number - 1, mask=(number > 0) & (number < E), other=0)
    tiles = (end - start + M - 1) // M
    before = tl.cumsum(tl.where(number < E, tiles, 0), 0)
    expert = tl.sum(((number < E) & (before <= tile)).to(tl.int32))
    mine = number == expert
    skipped = tile - tl.sum(tl.where(mine, before - tiles, 0))
    return expert, tl.sum(tl.where(mine, start, 0)) + skipped * M, tl.sum(tl.where(mine, end, 0))


@triton.jit
def grouped_kernel(
    x,
    weight,
    bias,
    order,
    weights,
    ends,
    out,
    K: tl.constexpr,
    E: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ON_INPUT: tl.constexpr,
    COMBINE: tl.constexpr,
    EXPERTS: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sorted row r of `out` [R, OUT] = a row of x times its expert's weight.

    Gated: the row is x[order[r] // K] and the weight [E, 2 OUT, WIDTH] (gate, then up), which the
    activation joins. Else it is x[r] and the weight [E, OUT, WIDTH].
    """
    expert, first, end = expert_of(tl.program_id(0), ends, E, EXPERTS, M)
    if expert >= E:
        return
    rows = first + tl.arange(0, M)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    source = rows
    if GATED:
        pick = tl.load(order + rows, mask=rows < end, other=0)
        source = pick // K
        if ON_INPUT:
            scale = tl.load(weights + pick, mask=rows < end, other=0.0)
            scale = scale.to(COMBINE).to(tl.float32)[:, None]
    at = x + source.to(tl.int64)[:, None] * WIDTH + depth[None, :]
    stride: tl.constexpr = 2 * OUT if GATED else OUT
    wanted = weight + (expert.to(tl.int64) * stride + columns)[:, None] * WIDTH + depth[None, :]
    total = tl.zeros([M, COLUMNS], tl.float32)
    total_up = tl.zeros([M, COLUMNS], tl.float32)
    for k in range(0, WIDTH, DEPTH):
        deep = depth[None, :] + k < WIDTH
        some = (columns < OUT)[:, None] & deep
        a = tl.load(at + k, mask=(rows < end)[:, None] & deep, other=0.0)
        if ON_INPUT:
            a = (a.to(tl.float32) * scale).to(x.dtype.element_ty)
        b = tl.load(wanted + k, mask=some, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        if GATED:
            b = tl.load(wanted + OUT * WIDTH + k, mask=some, other=0.0)
            total_up = tl.dot(a, tl.trans(b), total_up, input_precision="ieee")
    if bias is not None:
        by = bias + expert.to(tl.int64) * stride + columns
        total += tl.load(by, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
        if GATED:
            total_up += tl.load(by + OUT, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = gated(total, total_up, x, ACTIVATION, 0.0, False, 1.0, 0.0)
    there = (rows < end)[:, None] & (columns < OUT)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * OUT + columns[None, :], total, mask=there)


@triton.jit
def combine_kernel(
    parts,
    places,
    order,
    weights,
    ends,
    out,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    ON_INPUT: tl.constexpr,
    COMBINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = Σ of weight × parts[p] over the sorted places [T, K] at which token t stands."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(ends + E - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        place = tl.load(places + t * K + k)
        at = parts + place.to(tl.int64) * H + columns
        part = tl.load(at, mask=(columns < H) & (place < real), other=0.0).to(tl.float32)
        if not ON_INPUT:
            weight = tl.load(weights + tl.load(order + place)).to(COMBINE).to(tl.float32)
            part = rounded(part * weight, out)
        total = tl.where(place < real, rounded(total + part, out), total)
    tl.store(out + t * H + columns, total, mask=columns < H)


def experts_grouped(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_on_input: bool = False,
    combine_dtype: torch.dtype = torch.float32,
    products: str = "auto",
    block: Block | None = None,
) -> Tensor:
    """h [T, H] through the experts each token chose: [T, H] in its dtype.

    gate_up [E, 2I, H], down [E, H, I], biases [E, 2I] and [E, H]; expert_ids int32 and weights
    float32 [T, K], with -1 for an unused pick and null experts from id E on. `products`: `torch`,
    `triton`, or `auto`: torch's where `torch_products` says so.
    """
    T, K = expert_ids.shape
    E, _, width = down.shape
    assert activation in TORCH_ACTIVATIONS
    assert h.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous()
    biased = gate_up_bias is not None or down_bias is not None
    if products == "auto":
        products = "torch" if torch_products(h, width, biased) else "triton"
    assert products == "triton" or not biased, "torch rounds a product before it adds a bias"
    routes = sorted_routes(expert_ids, weights, E, combine_dtype, weight_on_input)
    if products == "torch":
        parts = _torch_parts(h, gate_up, down, routes, activation)
    else:
        block = block or grouped_block(T * K, E, h.dtype)
        inner = _products(h, gate_up, gate_up_bias, routes, block, activation)
        parts = _products(inner, down, down_bias, routes, block, None)
    return _combined(parts, routes)


@dataclass(slots=True, eq=False)
class Routes:
    """Picks sorted by expert. Unused picks and null experts come last and are not computed."""

    order: Tensor  # [T × K] int32: sorted row -> pick
    places: Tensor  # [T, K] int32: the sorted rows of each token, ascending
    ends: Tensor  # [E] int32: where each expert's rows end
    weights: Tensor  # [T, K] float32
    combine: torch.dtype
    on_input: bool


def sorted_routes(
    expert_ids: Tensor, weights: Tensor, E: int, combine: torch.dtype, on_input: bool
) -> Routes:
    """Sorts on the device; the host waits for nothing."""
    ids = expert_ids.flatten()
    ids = torch.where((ids < 0) | (ids >= E), E, ids)
    ranked, order = torch.sort(ids, stable=True)
    numbers = torch.arange(E, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ranked, numbers, right=True, out_int32=True)
    at = torch.arange(len(ids), device=ids.device)
    places = torch.empty_like(order).scatter_(0, order, at).view(expert_ids.shape)
    return Routes(
        order.int(), places.sort(1).values.int(), ends, weights.contiguous(), combine, on_input
    )


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes,
    block: Block,
    activation: str | None,
) -> Tensor:
    """The rows of each expert times its weight; with an activation, gathered and gated."""
    E, rows, width = weight.shape
    out = torch.empty(
        len(routes.order), rows // 2 if activation else rows, dtype=x.dtype, device=x.device
    )
    tiles = triton.cdiv(len(out), block.rows) + min(E, len(out))
    grouped_kernel[(tiles, triton.cdiv(out.shape[1], block.columns))](
        x,
        weight,
        bias,
        routes.order,
        routes.weights,
        routes.ends,
        out,
        K=routes.places.shape[1],
        E=E,
        OUT=out.shape[1],
        WIDTH=width,
        GATED=activation is not None,
        ACTIVATION=activation,
        ON_INPUT=routes.on_input and activation is not None,
        COMBINE=COMBINES[routes.combine],
        EXPERTS=triton.next_power_of_2(E),
        M=block.rows,
        COLUMNS=block.columns,
        DEPTH=block.depth,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return out


def torch_products(h: Tensor, width: int, biased: bool = False) -> bool:
    """Whether torch multiplies groups in one kernel here, with our rounding points."""
    fits = h.dtype is torch.bfloat16 and not biased and h.shape[1] % 8 == 0 and width % 8 == 0
    if not (fits and h.device.type == "cuda" and torch.version.hip is None):
        return False
    return hasattr(torch, "_grouped_mm") and torch.cuda.get_device_capability(h.device)[0] == 9


def _torch_parts(
    h: Tensor, gate_up: Tensor, down: Tensor, routes: Routes, activation: str
) -> Tensor:
    K = routes.places.shape[1]
    x = h[routes.order // K]
    if routes.on_input:
        scale = routes.weights.flatten()[routes.order].to(routes.combine)
        x = (x * scale[:, None]).to(h.dtype)
    both = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=routes.ends)
    gate, up = both.chunk(2, -1)
    inner = TORCH_ACTIVATIONS[activation](gate) * up
    return torch._grouped_mm(inner, down.transpose(1, 2), offs=routes.ends)


def _combined(parts: Tensor, routes: Routes) -> Tensor:
    (T, K), H = routes.places.shape, parts.shape[1]
    out = torch.empty(T, H, dtype=parts.dtype, device=parts.device)
    wide = min(1024, triton.next_power_of_2(H))
    combine_kernel[(T, triton.cdiv(H, wide))](
        parts,
        routes.places,
        routes.order,
        routes.weights,
        routes.ends,
        out,
        K=K,
        E=len(routes.ends),
        H=H,
        ON_INPUT=routes.on_input,
        COMBINE=COMBINES[routes.combine],
        BLOCK=wide,
        num_warps=4,
    )
    return out


def _aot(dtype: str, rows: int, E: int, H: int, width: int, gated: bool) -> tuple:
    block = grouped_block(rows, E, torch.bfloat16 if dtype == "*bf16" else torch.float32)
    types = dict.fromkeys(("x", "weight", "out"), dtype)
    types |= {"order": "*i32", "ends": "*i32", "weights": "*fp32"}
    sizes = {"OUT": width if gated else H, "WIDTH": H if gated else width, "K": 8, "E": E}
    fixed = {"bias": None, "ACTIVATION": "silu", "ON_INPUT": False, "COMBINE": tl.float32}
    fixed |= {"GATED": gated, "EXPERTS": triton.next_power_of_2(E)}
    fixed |= {"M": block.rows, "COLUMNS": block.columns, "DEPTH": block.depth}
    options = {"num_warps": block.warps, "num_stages": block.stages}
    return grouped_kernel, types, sizes | fixed, options


AOT = {
    "gate-up, OLMoE, 128 tokens": _aot("*bf16", 1024, 64, 2048, 1024, True),
    "down, OLMoE, 512 tokens": _aot("*bf16", 4096, 64, 2048, 1024, False),
    "gate-up, Qwen3-30B, 4096 tokens": _aot("*bf16", 32768, 128, 2048, 768, True),
    "gate-up, float32": _aot("*fp32", 1024, 64, 2048, 1024, True),
    "combine": (
        combine_kernel,
        dict.fromkeys(("parts", "out"), "*bf16")
        | dict.fromkeys(("places", "order", "ends"), "*i32")
        | {"weights": "*fp32"},
        {"K": 8, "E": 64, "H": 2048, "ON_INPUT": False, "COMBINE": tl.float32, "BLOCK": 1024},
        {"num_warps": 4},
    ),
}
