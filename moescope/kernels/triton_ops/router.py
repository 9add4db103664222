"""The router in one launch: logits [T, E] to every field of `Routing`, under P policies a row.

Policies are rows of a float32 table on the device (see `policy_rows`), read at run time: a toggle
writes a row, and neither a kernel is compiled nor a graph captured again. Letters: T tokens, E
expert classes, K picked, P policies a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescope.kernels.policy_rows import pack
from moescope.kernels.reference import check_spec
from moescope.kernels.spec import RouterSpec, Routing
from moescope.kernels.torch_ops import _rows, route_torch
from moescope.kernels.triton_ops import columns as at
from moescope.kernels.triton_ops.rows import route_row

E_MAX, K_MAX = 1024, 32


def covers(E: int, K: int) -> str:
    """ "" where the kernels take E classes and K picks, else why not."""
    if E > E_MAX:
        return f"{E} experts: the fused router takes {E_MAX}"
    return f"{K} picks: the fused router takes {K_MAX}" if K > K_MAX else ""


def route_triton(
    logits: Tensor,
    spec: RouterSpec,
    *,
    correction_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    token_ids: Tensor | None = None,
    hash_table: Tensor | None = None,
    keep_logits: bool = False,
) -> Routing:
    """See `moescope.kernels.route`. What `covers` refuses goes to the torch router."""
    check_spec(spec)
    if logits.ndim != 2 or logits.shape[1] != spec.E:
        raise ValueError(f"logits: expected [T, {spec.E}], found {list(logits.shape)}")
    p, T = spec.policy, len(logits)
    bias = _rows("correction_bias", correction_bias, logits, p.correction_bias != "none")
    scale = _rows("per_expert_scale", per_expert_scale, logits, p.per_expert_scale)
    if covers(spec.E, spec.K):
        given = (correction_bias, per_expert_scale, token_ids, hash_table, keep_logits)
        names = ("correction_bias", "per_expert_scale", "token_ids", "hash_table", "keep_logits")
        return route_torch(logits, spec, **dict(zip(names, given, strict=True)))
    hashed = spec.wiring.hash_table
    if hashed:
        _check_hash(token_ids, hash_table, T, spec.K)
    routing = route_rows(
        logits.contiguous(),
        _packed(spec).to(logits.device),
        torch.zeros(T, 1, dtype=torch.int32, device=logits.device),
        spec.K,
        None if bias is None else bias.contiguous(),
        None if scale is None else scale.contiguous(),
        hash_table.contiguous() if hashed else None,
        token_ids,
        keep_logits=keep_logits,
    )
    fields = {name: getattr(routing, name) for name in Routing.__slots__}
    return Routing(**{n: a[:, 0] if n != "logits" else a for n, a in fields.items()})


def empty(T: int, P: int, K: int, device: Any, E: int = 0) -> Routing:
    """Room for the routing of T rows under P policies each; with E also for their logits."""

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Routing(
        expert_ids=room(torch.int32, T, P, K),
        scores=room(torch.float32, T, P, K),
        weights=room(torch.float32, T, P, K),
        score_sum=room(torch.float32, T, P),
        mass=room(torch.float32, T, P),
        entropy=room(torch.float32, T, P),
        margin=room(torch.float32, T, P),
        runner_up=room(torch.int32, T, P),
        logits=room(torch.float32, T, E) if E else None,
    )


def route_rows(
    logits: Tensor,
    rows: Tensor,
    row_of: Tensor,
    K_max: int,
    bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
    token_ids: Tensor | None = None,
    out: Routing | None = None,
    *,
    keep_logits: bool = False,
) -> Routing:
    """Route logits [T, E] under the rows [n, 32] float32 that `row_of` [T, P] int32 names.

    `bias` and `per_expert_scale` are [E] or [T, E] (or [1, E]), `hash_table` [V, K_max or more] of
    int32 or int64 with `token_ids` [T]. All arrays are contiguous, on one device. The fields of the
    result are [T, P, K_max] and [T, P] (`logits`: [T, E]); with `out` they are written there and
    nothing is allocated. A policy with fewer than K_max picks, and a place with row -1, hold id -1
    and zeros in the rest.
    """
    (T, E), P = logits.shape, row_of.shape[1]
    if out is None:
        out = empty(T, P, K_max, logits.device, E if keep_logits else 0)
    if T == 0 or P == 0:
        return out
    hashed = hash_table is not None
    _route[(T, P)](
        logits,
        rows,
        row_of,
        logits if bias is None else bias,
        logits if per_expert_scale is None else per_expert_scale,
        hash_table if hashed else row_of,
        token_ids if hashed else row_of,
        _stride(bias, E),
        _stride(per_expert_scale, E),
        hash_table.shape[1] if hashed else 0,
        *outputs(out),
        **sizes(E, K_max, bias, per_expert_scale, hashed),
        KEEP=out.logits is not None,
        **options(E),
    )
    return out


def outputs(out: Routing) -> tuple[Tensor, ...]:
    """The arrays of `out` in the order kernels take them."""
    arrays = [getattr(out, name) for name in Routing.__slots__]
    return (*arrays[:-1], arrays[0] if out.logits is None else out.logits)


def sizes(E: int, K_max: int, bias: Any, scale: Any, hashed: bool) -> dict[str, Any]:
    """What a routing kernel is compiled for."""
    return {
        "E": E,
        "E_PAD": triton.next_power_of_2(E),
        "K_MAX": K_max,
        "K_PAD": triton.next_power_of_2(K_max),
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HASHED": hashed,
    }


def options(E: int) -> dict[str, Any]:
    """How a routing kernel is launched: one warp a row, so that no pick waits at a barrier."""
    return {"num_warps": 1 if E <= 512 else 4, "enable_fp_fusion": False}


@triton.jit
def _route(
    logits,
    rows,
    row_of,
    bias,
    scale,
    table,
    tokens,
    bias_stride,
    scale_stride,
    table_stride,
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
    KEEP: tl.constexpr,
):
    """One program a row and policy."""
    t, p, P = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    e = tl.arange(0, E_PAD)
    place = t * P + p
    row = tl.load(row_of + place)
    x = tl.load(logits + t * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    if KEEP:  # noqa: SIM102
        if p == 0:
            tl.store(logits_out + t * E + e, x, mask=e < E)
    hashed = table
    if HASHED:
        hashed = table + tl.load(tokens + t) * table_stride
    route_and_store(
        x,
        rows,
        row,
        bias + t * bias_stride,
        scale + t * scale_stride,
        hashed,
        place,
        ids_out,
        scores_out,
        weights_out,
        score_sum_out,
        mass_out,
        entropy_out,
        margin_out,
        runner_up_out,
        E,
        E_PAD,
        K_MAX,
        K_PAD,
        HAS_BIAS,
        HAS_SCALE,
        HASHED,
    )


@triton.jit
def route_and_store(
    x,
    rows,
    row,
    bias,
    scale,
    hashed,
    place,
    ids_out,
    scores_out,
    weights_out,
    score_sum_out,
    mass_out,
    entropy_out,
    margin_out,
    runner_up_out,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_MAX: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HASHED: tl.constexpr,
):
    """`route_row`, and its results at one place of the outputs; blanks where `row` is -1."""
    slot = tl.arange(0, K_PAD)
    cell, held = place * K_MAX + slot, slot < K_MAX
    if row >= 0:
        ids, scores, weights, score_sum, mass, entropy, margin, runner_up = route_row(
            x,
            rows + row * at.ROW,
            bias,
            scale,
            hashed,
            E,
            E_PAD,
            K_PAD,
            HAS_BIAS,
            HAS_SCALE,
            HASHED,
        )
        tl.store(ids_out + cell, ids, mask=held)
        tl.store(scores_out + cell, scores, mask=held)
        tl.store(weights_out + cell, weights, mask=held)
        tl.store(score_sum_out + place, score_sum)
        tl.store(mass_out + place, mass)
        tl.store(entropy_out + place, entropy)
        tl.store(margin_out + place, margin)
        tl.store(runner_up_out + place, runner_up)
    else:
        tl.store(ids_out + cell, tl.full([K_PAD], -1, tl.int32), mask=held)
        tl.store(scores_out + cell, tl.full([K_PAD], 0.0, tl.float32), mask=held)
        tl.store(weights_out + cell, tl.full([K_PAD], 0.0, tl.float32), mask=held)
        tl.store(score_sum_out + place, 0.0)
        tl.store(mass_out + place, 0.0)
        tl.store(entropy_out + place, 0.0)
        tl.store(margin_out + place, 0.0)
        tl.store(runner_up_out + place, -1)


@lru_cache(maxsize=1024)
def _packed(spec: RouterSpec) -> Tensor:
    return torch.from_numpy(pack(spec)).float()[None]


def _stride(vectors: Tensor | None, E: int) -> int:
    """How far a learned vector moves from one row to the next."""
    return E if vectors is not None and vectors.ndim == 2 and len(vectors) > 1 else 0


def _check_hash(token_ids: Tensor | None, table: Tensor | None, T: int, K: int) -> None:
    if token_ids is None or table is None:
        raise ValueError("hash_table: this router needs token_ids and hash_table")
    if token_ids.shape != (T,):
        raise ValueError(f"token_ids: expected [{T}], found {list(token_ids.shape)}")
    if table.ndim != 2 or table.shape[1] < K:
        raise ValueError(
            f"hash_table: expected [V, {K}] for num_experts_per_tok {K}, found {list(table.shape)}"
        )


_INPUTS = {"rows": "*fp32", "row_of": "*i32", "bias": "*fp32", "scale": "*fp32"}
_INPUTS |= {"table": "*i32", "tokens": "*i64"}
_INPUTS |= {name: "i32" for name in ("bias_stride", "scale_stride", "table_stride")}
OUTPUT_TYPES = {
    f"{name}_out": "*i32" if name in ("ids", "runner_up") else "*fp32"
    for name in (
        *("ids", "scores", "weights", "score_sum", "mass", "entropy", "margin"),
        *("runner_up", "logits"),
    )
}


def _aot(dtype: str, E: int, K: int, *, bias: Any = None, hashed: bool = False) -> Any:
    types = {"logits": dtype, **_INPUTS, **OUTPUT_TYPES}
    return (_route, types, {**sizes(E, K, bias, bias, hashed), "KEEP": True}, options(E))


AOT = {
    "Qwen3-30B": _aot("*bf16", 128, 8),
    "every input, any K, four warps": _aot("*fp32", 1024, 32, bias=True),
    "hashed, not a power of two": _aot("*fp16", 96, 6, hashed=True),
}
