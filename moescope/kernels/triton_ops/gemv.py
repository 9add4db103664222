"""Matrix-vector products for one token of each of a few lanes: `linear_small`, and its parts.

A program takes whole rows of the weight, as many as its tile says, in one tile of registers, and
multiplies it by every lane. So a weight is read once whatever the number of lanes, a program has
all its loads under way before it needs the first, sums need no second pass (no atomics, no split
of a row over programs: models have thousands of rows of at most some thousand columns), and a
lane's bits do not depend on the lanes beside it: the order of a sum follows from the row's width
and the dtype alone. Weights are marked as first to leave the cache; they are not used again before
the next token.

With `pdl`, a kernel may start before the one ahead of it has ended, and waits for it once its own
weights are on their way (programmatic dependent launch; CUDA, compute capability 9.0 and above).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moescope.kernels.triton_ops.tiles import WIDEST, Tile, linear_tile

LANES = 8  # above it the products are no longer bound by reading the weights


@triton.jit
def rounded(x, like):
    """float32 rounded to the dtype of what `like` points to."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def weight_rows(
    weight, row, OUT: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, wanted
):
    """Rows [row, row + ROWS) of a matrix [OUT, H] as [ROWS, BLOCK]; nothing is read unless `wanted`
    (None: always)."""
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = weight + rows.to(tl.int64)[:, None] * H + columns[None, :]
    if wanted is None and H == BLOCK and OUT % ROWS == 0:
        return tl.load(at, eviction_policy="evict_first")
    keep = (rows < OUT)[:, None] & (columns < H)[None, :]
    if wanted is not None:
        keep = keep & wanted
    return tl.load(at, mask=keep, other=0.0, eviction_policy="evict_first")


@triton.jit
def input_row(
    x, n, norm, EPS: tl.constexpr, APPLIES: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):
    """Row n of x [N, H] as float32 [BLOCK], RMS-normalised where there is a norm's weight, with the
    rounding points of `torch_operators.make_norm`."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + n * H + columns, mask=columns < H, other=0.0).to(tl.float32)
    if norm is not None:
        by = tl.load(norm + columns, mask=columns < H, other=0.0).to(tl.float32)
        row = row * tl.rsqrt(tl.sum(row * row) / H + EPS)
        if APPLIES == "model":
            row = rounded(row, x)
        row = rounded(row * by, x)
    return row


@triton.jit
def products(tile, row):
    """[ROWS, BLOCK] times [BLOCK], summed in float32: [ROWS]."""
    return tl.sum(tile.to(tl.float32) * row[None, :], axis=1)


@triton.jit
def linear_kernel(
    x,
    weight,
    out,
    bias,
    norm,
    gate,
    residual,
    N: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    APPLIES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    tile = weight_rows(weight, first, OUT, H, ROWS, BLOCK, None)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = first + tl.arange(0, ROWS)
    for n in range(N):
        y = products(tile, input_row(x, n, norm, EPS, APPLIES, H, BLOCK))
        if bias is not None:
            y += tl.load(bias + rows, mask=rows < OUT, other=0.0).to(tl.float32)
        y = rounded(y, x)
        if gate is not None:
            opened = 1 / (1 + tl.exp(-tl.load(gate + n).to(tl.float32)))
            y = rounded(rounded(opened, x) * y, x)
        if MULTIPLIER != 1.0:
            y = rounded(y * MULTIPLIER, x)
        if residual is not None:
            held = tl.load(residual + n * OUT + rows, mask=rows < OUT, other=0.0)
            y = rounded(held.to(tl.float32) + y, x)
        tl.store(out + n * OUT + rows, y, mask=rows < OUT)


def linear_small(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    applies: str = "model",
    gate: Tensor | None = None,
    multiplier: float = 1.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> Tensor:
    """x [N, H] times weight [OUT, H], N from 1 to 8: [N, OUT] in the dtype of x, in one launch.

    `norm` [H] RMS-normalises x first, as `Norm.applies` says. The product, with `bias` [OUT], is
    rounded; then, each rounded, come sigmoid(`gate` [N, 1]) times it, `multiplier`, and `residual`
    [N, OUT] plus it, which `out` may be. `out` may be float32: it then holds the rounded values.
    """
    N, H = x.shape
    OUT = weight.shape[0]
    check_products(x, weight, norm, bias, gate, residual, out)
    out = torch.empty(N, OUT, dtype=x.dtype, device=x.device) if out is None else out
    tile = tile or linear_tile(OUT, H)
    linear_kernel[(triton.cdiv(OUT, tile.rows),)](
        x,
        weight,
        out,
        bias,
        norm,
        gate,
        residual,
        N=N,
        OUT=OUT,
        H=H,
        EPS=eps,
        APPLIES=applies,
        MULTIPLIER=multiplier,
        ROWS=tile.rows,
        BLOCK=triton.next_power_of_2(H),
        PDL=pdl,
        num_warps=tile.warps,
        **launch(pdl),
    )
    return out


def check_products(x: Tensor, *others: Tensor | None) -> None:
    assert 1 <= x.shape[0] <= LANES, f"{x.shape[0]} lanes"
    assert x.shape[1] <= WIDEST, f"rows of {x.shape[1]} columns"
    for tensor in (x, *others):
        assert tensor is None or tensor.is_contiguous()


def launch(pdl: bool) -> dict[str, bool]:
    """Options that only CUDA's launcher knows."""
    return {"launch_pdl": True} if pdl else {}


def aot_linear(
    dtype: str, N: int, OUT: int, H: int, *, norm: bool, residual: bool, pdl: bool = False
) -> tuple:
    """A case for `AOT`: a product of these sizes as `linear_small` would launch it."""
    tile = linear_tile(OUT, H)
    types = dict.fromkeys(("x", "weight", "out"), dtype)
    absent = dict.fromkeys(("bias", "gate"))
    for name, there in (("norm", norm), ("residual", residual)):
        (types if there else absent)[name] = dtype if there else None
    sizes = {"N": N, "OUT": OUT, "H": H, "ROWS": tile.rows, "BLOCK": triton.next_power_of_2(H)}
    fixed = {"EPS": 1e-5, "APPLIES": "model", "MULTIPLIER": 1.0, "PDL": pdl}
    return linear_kernel, types, absent | sizes | fixed, {"num_warps": tile.warps}


AOT = {
    "qkv, OLMoE": aot_linear("*bf16", 1, 6144, 2048, norm=True, residual=False),
    "qkv, Qwen3-30B, 4 lanes": aot_linear("*bf16", 4, 5120, 2048, norm=True, residual=False),
    "o_proj, Qwen3-30B": aot_linear("*bf16", 1, 2048, 4096, norm=False, residual=True),
    "o_proj, OLMoE, 8 lanes": aot_linear("*bf16", 8, 2048, 2048, norm=False, residual=True),
    "head, OLMoE": aot_linear("*bf16", 1, 50304, 2048, norm=True, residual=False),
    "head, Qwen3-30B, 8 lanes": aot_linear("*bf16", 8, 151936, 2048, norm=True, residual=False),
    "head, float32": aot_linear("*fp32", 1, 50304, 2048, norm=True, residual=False),
    "7168 columns": aot_linear("*fp16", 1, 2048, 7168, norm=True, residual=True),
}
