"""The experts of many rows in C (`native/prompt.c`): bfloat16 torch tensors on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moescope.kernels import native_ops as native

MULTIPLE = 32  # of both widths


def covers(gate_up: Tensor, down: Tensor) -> bool:
    """Whether `experts` takes these weights here: gate_up [E, 2I, H], down [E, H, I]."""
    _, hidden, width = down.shape
    return (
        gate_up.device.type == "cpu"
        and gate_up.dtype is down.dtype is torch.bfloat16
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and hidden % MULTIPLE == width % MULTIPLE == 0
        and native.available() == "avx512-bf16"
    )


def experts(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    weight_on_input: bool = False,
    threads: int = 0,
) -> Tensor:
    """h [R, H] through the experts each row chose: [R, H] in bfloat16.

    expert_ids [R, K] int32, of which those outside 0..E-1 are no experts; weights [R, K] float32,
    already rounded to the dtype they are combined in. silu(gate) times up; a row's parts are added
    in the order of experts, and each step is rounded as torch rounds it.
    """
    E, hidden, width = down.shape
    h, ids = h.contiguous(), expert_ids.int().contiguous()
    weights, out = weights.float().contiguous(), torch.empty_like(h)
    given = native.Experts(
        *(len(h), ids.shape[1], E, hidden, width, weight_on_input),
        *(tensor.data_ptr() for tensor in (ids, weights, h, gate_up, down, out)),
    )
    pool = native.pool(threads or torch.get_num_threads())
    with pool.lock:
        failed = pool.library.mk_experts_run(
            pool.handle, native.wanted_isa(), ctypes.addressof(given)
        )
    if failed:
        raise MemoryError("no memory for the experts of a prompt")
    return out
