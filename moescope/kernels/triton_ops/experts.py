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

from moescope.kernels.triton_ops.experts_kernels import down_kernel, gate_up_kernel
from moescope.kernels.triton_ops.gating import Gating
from moescope.kernels.triton_ops.gemv import check_products, launch
from moescope.kernels.triton_ops.tiles import WIDEST, ExpertTiles, Tile, expert_tiles

COMBINES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


PLAIN = Gating()


def experts_small(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor | None,
    weights: Tensor | None,
    *,
    gating: Gating = PLAIN,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_on_input: bool = False,
    combine_dtype: torch.dtype = torch.float32,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    applies: str = "model",
    passed: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_bias: Tensor | None = None,
    shared: Tensor | None = None,
    average: bool = False,
    multiplier: float = 1.0,
    residual: Tensor | None = None,
    inner: Tensor | None = None,
    out: Tensor | None = None,
    tiles: ExpertTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """h [N, H] through the experts each lane chose: [N, H] in its dtype, N from 1 to 8.

    gate_up [E, 2I, H] (rows of gate, then of up; [E, I, H] where `gating` has no glu), down [E, H,
    I], biases [E, 2I] and [E, H].
    expert_ids int32 and weights float32 [N, K], rows equally far apart: -1 is an unused pick, ids
    from E on are null experts, a lane's ids are distinct (weights of equal ones are added first).
    Without them every lane takes expert 0 with weight 1.

    `norm` [H] normalises h first. What follows the sum, each step rounded: plus `passed` [N, H]
    times the weights of null experts, times `output_scale` float32 [N], plus `output_bias` [H],
    plus `shared` [N, H], half of both with `average`, times `multiplier`, plus `residual` [N, H],
    which `out` may be. `inner` is scratch of `inner_shape` in h's dtype.
    """
    N, H = h.shape
    E, _, width = down.shape
    check_products(h, gate_up, down, norm, gate_up_bias, down_bias, output_scale, shared, residual)
    check_products(h, passed, output_bias)
    assert width <= WIDEST and gate_up.shape[1] == (2 if gating.glu else 1) * width
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
        **gating.constants(),
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
        passed,
        output_scale,
        output_bias,
        shared,
        residual,
        out,
        stride,
        MULTIPLIER=multiplier,
        AVERAGE=average,
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
    gate_up |= {"bias": None, "norm": None, "EPS": 1e-5, "APPLIES": "model", **PLAIN.constants()}
    down = dict.fromkeys(("inner", "weight", "out", "residual"), dtype) | routes
    down |= dict.fromkeys(("bias", "passed", "output_scale", "output_bias", "shared"))
    down |= {"MULTIPLIER": 1.0, "AVERAGE": False}
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
        AVERAGE=True,
        bias="*fp16",
        passed="*fp16",
        output_bias="*fp16",
        shared="*fp16",
        output_scale="*fp32",
    ),
    "gpt-oss": _aot(
        *("*bf16", 1, 32, 128, 2880, 2880),
        bias="*bf16",
        **Gating("swiglu_oai", limit=7.0, alpha=1.702, up_shift=1.0).constants(),
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
