"""RMS norm of one row for each of N lanes, where no product can take it along: norms behind an
operator, with the sum they go into. Letters: N lanes, H width of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moescope.kernels.triton_ops.gemv import input_row, rounded


@triton.jit
def _norm(
    x,  # [N, H]
    weight,  # [H]
    held,  # [N, H] or None
    out,  # [N, H]
    H: tl.constexpr,
    EPS: tl.constexpr,
    APPLIES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    y = input_row(x, n, weight, EPS, APPLIES, H, BLOCK)
    if MULTIPLIER != 1.0:
        y = rounded(y * MULTIPLIER, x)
    if held is not None:
        y = rounded(tl.load(held + n * H + i, mask=i < H, other=0.0).to(tl.float32) + y, x)
    tl.store(out + n * H + i, y, mask=i < H)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    applies: str,
    *,
    multiplier: float = 1.0,
    held: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """`out` [N, H] = `held` + multiplier × norm(x), rounded after each; `out` may be x or `held`.
    `applies` as in `Norm`."""
    N, H = x.shape
    BLOCK = triton.next_power_of_2(H)
    _norm[(N,)](
        x, weight, held, out,
        H=H, EPS=eps, APPLIES=applies, MULTIPLIER=multiplier, BLOCK=BLOCK,
        num_warps=max(1, min(16, BLOCK // 512)),
    )  # fmt: skip
    return out


AOT = {
    f"norm {dtype}, {held or 'alone'}": (
        _norm,
        {"x": dtype, "weight": dtype, "out": dtype} | ({"held": dtype} if held else {}),
        {"H": 2048, "EPS": 1e-5, "APPLIES": applies, "MULTIPLIER": multiplier, "BLOCK": 2048}
        | ({} if held else {"held": None}),
        {"num_warps": 4},
    )
    for dtype, held, applies, multiplier in (
        ("*bf16", "added", "model", 1.0),
        ("*fp32", "", "float32", 0.5),
    )
}
