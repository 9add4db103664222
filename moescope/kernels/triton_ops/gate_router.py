"""Gate and router in one launch for a few rows: hidden [T, H] and the gate's weight to `Routing`.

Programs split the experts and the hidden width, so that a gate of a few hundred kilobytes is read
by the whole device at once. The last programs to arrive route a row each: an arrival counter, never
reset, says which, so that a replayed graph finds it in order. Sums are in a fixed order.

Letters: T tokens, H hidden width, E expert classes, K picked, P policies a row, G copies of the
gate's weight (as stored, or rounded to fewer bits), S parts of the hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescope.kernels.spec import Routing
from moescope.kernels.triton_ops import columns as at
from moescope.kernels.triton_ops.arithmetic import rounded
from moescope.kernels.triton_ops.gemv import rounded as rounded_like
from moescope.kernels.triton_ops.router import (
    OUTPUT_TYPES,
    empty,
    options,
    outputs,
    route_and_store,
    sizes,
)
from moescope.kernels.triton_ops.router import covers as covers_router

T_MAX, P_MAX = 8, 32
PART = 2048  # columns of the gate that a program reads: all of them at once, with one warp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in `policy_rows`


def covers(T: int, E: int, K: int) -> str:
    """ "" where the kernel takes T rows, E classes and K picks, else why not."""
    if T > T_MAX:
        return f"{T} rows: the fused gate takes {T_MAX}"
    return covers_router(E, K)


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """Device memory of one router: nobody else may use it while a launch is in flight."""

    partials: Tensor  # [G, S, T, E] float32
    arrivals: Tensor  # [1] int32, 0 before the first launch


def scratch(T: int, E: int, H: int, G: int, device: Any) -> Scratch:
    """What `gate_and_route` needs for these sizes. T is the most rows of a launch."""
    S = triton.cdiv(H, PART)
    partials = torch.empty(G, S, T, E, dtype=torch.float32, device=device)
    return Scratch(partials, torch.zeros(1, dtype=torch.int32, device=device))


def gate_and_route(
    hidden: Tensor,
    gate: Tensor,
    rows: Tensor,
    row_of: Tensor,
    K_max: int,
    work: Scratch,
    router_dtype: torch.dtype,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
    token_ids: Tensor | None = None,
    out: Routing | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    applies: str = "model",
    scale: float = 1.0,
    keep_logits: bool = False,
) -> Routing:
    """Route hidden [T, H] through the gate [G, E, H] under the rows that `row_of` [T, P] names.

    As `router.route_rows`, with logits = hidden @ gate.T (+ `gate_bias` [E]): inputs rounded to
    `router_dtype`, products summed in float32, the logits rounded once more. Column `gate` of a
    policy names the copy it reads. `bias`, `per_expert_scale` and `gate_bias` are [E]. Logits that
    are kept are those of a row's first place. `norm` [H] RMS-normalises hidden first, as in
    `gemv.linear_small`, and `scale` then multiplies it. All arrays are contiguous; P is at most 32.
    """
    (T, H), (G, E, _), P = hidden.shape, gate.shape, row_of.shape[1]
    assert not covers(T, E, K_max) and P <= P_MAX and work.partials.shape[0] == G
    if out is None:
        out = empty(T, P, K_max, hidden.device, E if keep_logits else 0)
    hashed = hash_table is not None
    constants, grid = _launch(T, H, E, G, K_max, P, bias, per_expert_scale, hashed)
    _gate_and_route[grid](
        hidden,
        gate,
        norm,
        gate if gate_bias is None else gate_bias,
        rows,
        row_of,
        gate if bias is None else bias,
        gate if per_expert_scale is None else per_expert_scale,
        hash_table if hashed else row_of,
        token_ids if hashed else row_of,
        hash_table.shape[1] if hashed else 0,
        work.partials,
        work.arrivals,
        *outputs(out),
        **constants,
        GATE_BIAS=gate_bias is not None,
        DTYPE=DTYPES[router_dtype],
        KEEP=out.logits is not None,
        WAIT=not triton.knobs.runtime.interpret,
        EPS=eps,
        APPLIES=applies,
        SCALE=scale,
        **options(E),
    )
    return out


def _launch(
    T: int, H: int, E: int, G: int, K_max: int, P: int, bias: Any, scale: Any, hashed: bool
) -> tuple[dict[str, Any], tuple[int]]:
    """Constants and grid: the number of programs is a power of two, so that arrivals may wrap."""
    parts = triton.cdiv(H, PART)
    grid = (triton.next_power_of_2(G * parts * E),)
    constants = {
        **sizes(E, K_max, bias, scale, hashed),
        "T": T,
        "P": P,
        "G": G,
        "PARTS": parts,
        "H": H,
        "H_PAD": triton.next_power_of_2(triton.cdiv(H, parts)),
    }
    return constants, grid


@triton.jit
def _gate_and_route(
    hidden,
    gate,
    norm,
    gate_bias,
    rows,
    row_of,
    bias,
    scale,
    table,
    tokens,
    table_stride,
    partials,
    arrivals,
    ids_out,
    scores_out,
    weights_out,
    score_sum_out,
    mass_out,
    entropy_out,
    margin_out,
    runner_up_out,
    logits_out,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_MAX: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HASHED: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
    WAIT: tl.constexpr,
    EPS: tl.constexpr,
    APPLIES: tl.constexpr,
    SCALE: tl.constexpr,
):
    """One program an expert, part of the width and copy of the gate; then one a row and policy."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if program < G * PARTS * E:
        copy, part, expert = program // (PARTS * E), (program // E) % PARTS, program % E
        _multiply(
            *(hidden, gate, norm, rows, row_of, partials, copy, part, expert),
            *(E, T, P, G, PARTS, H, H_PAD, DTYPE, EPS, APPLIES, SCALE),
        )
    tl.debug_barrier()
    ticket = tl.atomic_add(arrivals, 1, sem="acq_rel")
    # the last R to arrive route a row each; of tickets only differences count, for they wrap
    ROUTED: tl.constexpr = T * P
    behind = programs - 1 - (ticket & (programs - 1))
    if WAIT:
        place, stride = behind, programs
        if behind < ROUTED:
            target = ticket + behind + 1
            while tl.atomic_add(arrivals, 0, sem="acquire") - target < 0:
                pass
    else:  # programs run one after another: the last has all rows to route
        place, stride = tl.where(behind == 0, 0, ROUTED), 1
    while place < ROUTED:
        row = tl.load(row_of + place)
        copy = tl.load(rows + tl.maximum(row, 0) * at.ROW + at.GATE).to(tl.int32)
        t = place // P
        x = _logits(
            *(partials + copy * (PARTS * T * E) + t * E, gate_bias),
            *(E, E_PAD, T, PARTS, GATE_BIAS, DTYPE),
        )
        if KEEP:  # noqa: SIM102
            if place % P == 0:
                e = tl.arange(0, E_PAD)
                tl.store(logits_out + t * E + e, x, mask=e < E)
        hashed = table
        if HASHED:
            hashed = table + tl.load(tokens + t) * table_stride
        route_and_store(
            *(x, rows, row, bias, scale, hashed, place),
            *(ids_out, scores_out, weights_out, score_sum_out, mass_out, entropy_out),
            *(margin_out, runner_up_out),
            *(E, E_PAD, K_MAX, K_PAD, HAS_BIAS, HAS_SCALE, HASHED),
        )
        place += stride


@triton.jit
def _multiply(
    hidden,
    gate,
    norm,
    rows,
    row_of,
    partials,
    copy,
    part,
    expert,
    E: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    APPLIES: tl.constexpr,
    SCALE: tl.constexpr,
):
    """All rows' products with one part of one expert's gate, if any policy reads that copy."""
    wanted = True
    if G > 1:
        every = tl.arange(0, 256)
        row = tl.load(row_of + every, mask=every < T * P, other=-1)
        wants = tl.load(rows + row * at.ROW + at.GATE, mask=row >= 0, other=-1.0)
        # a place without a policy shows the logits of the first copy
        wanted = tl.max(((wants == copy) | (copy == 0)).to(tl.int32)) > 0
    if wanted:
        WIDTH: tl.constexpr = (H + PARTS - 1) // PARTS
        i = tl.arange(0, H_PAD)
        h = part * WIDTH + i
        inside = (i < WIDTH) & (h < H)
        first = (copy * E + expert).to(tl.int64) * H
        w = _as(tl.load(gate + first + h, mask=inside, other=0.0).to(tl.float32), DTYPE)
        for t in tl.static_range(T):
            x = tl.load(hidden + t * H + h, mask=inside, other=0.0).to(tl.float32)
            if norm is not None:
                squares = 0.0
                for other in tl.static_range(PARTS):
                    j = other * WIDTH + i
                    seen = (i < WIDTH) & (j < H)
                    y = tl.load(hidden + t * H + j, mask=seen, other=0.0).to(tl.float32)
                    squares += tl.sum(y * y)
                x = x * tl.rsqrt(squares / H + EPS)
                if APPLIES == "model":
                    x = rounded_like(x, hidden)
                by = tl.load(norm + h, mask=inside, other=0.0).to(tl.float32)
                x = rounded_like(x * by, hidden)
                if SCALE != 1.0:
                    x = rounded_like(x * SCALE, hidden)
            product = tl.sum(_as(x, DTYPE) * w)
            tl.store(partials + ((copy * PARTS + part) * T + t) * E + expert, product)


@triton.jit
def _logits(
    partials,
    gate_bias,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One row's logits [E_PAD]: its parts in order, the bias, and the last rounding."""
    e = tl.arange(0, E_PAD)
    x = tl.zeros([E_PAD], tl.float32)
    for part in tl.static_range(PARTS):  # past the first-level cache: others wrote them just now
        x += tl.load(partials + part * (T * E) + e, mask=e < E, other=0.0, cache_modifier=".cg")
    if GATE_BIAS:
        x += _as(tl.load(gate_bias + e, mask=e < E, other=0.0).to(tl.float32), DTYPE)
    return tl.where(e < E, _as(x, DTYPE), float("-inf"))


@triton.jit
def _as(x, DTYPE: tl.constexpr):
    """float32 rounded to a dtype known to the compiler."""
    y = x
    if DTYPE != 0:
        y = rounded(x, DTYPE)
    return y


def _aot(
    dtype: str,
    T: int,
    H: int,
    E: int,
    *,
    G: int = 1,
    P: int = 1,
    bias: Any = None,
    norm: bool = False,
    scale: float = 1.0,
) -> Any:
    constants, _ = _launch(T, H, E, G, 8, P, bias, None, False)
    types = {"hidden": dtype, "gate": dtype, "gate_bias": dtype, "rows": "*fp32"}
    types |= {"row_of": "*i32", "bias": "*fp32", "scale": "*fp32", "table": "*i32"}
    types |= {"tokens": "*i64", "table_stride": "i32", "partials": "*fp32", "arrivals": "*i32"}
    constants |= {"GATE_BIAS": bias is not None, "DTYPE": 1, "KEEP": True, "WAIT": True}
    constants |= {"EPS": 1e-6, "APPLIES": "model", "SCALE": scale} | (
        {} if norm else {"norm": None}
    )
    types |= {"norm": dtype} if norm else {}
    return (_gate_and_route, types | OUTPUT_TYPES, constants, options(E))


AOT = {
    "Qwen3-30B, 8 rows, 3 gates": _aot("*bf16", 8, 2048, 128, G=3),
    "Qwen3-30B, 1 row, norm": _aot("*bf16", 1, 2048, 128, norm=True),
    "Gemma 4, 1 row": _aot("*bf16", 1, 2816, 128, norm=True, scale=2816**-0.5),
    "DeepSeek-V3, 1 row, 5 policies": _aot("*bf16", 1, 7168, 256, P=5, bias=True),
}
