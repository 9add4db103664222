"""The next token of N lanes, drawn where the logits are.

`greedy` is one launch: the likeliest token, and with it the input of the step after. `draw` is
torch operations, with the filters of `engine.sampling.candidates` in the same order and in float64;
random numbers come from the host. Letters: N lanes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of one program


@triton.jit
def _greedy(
    logits,  # [N, V]
    tops,  # [N, BLOCKS] float32
    ids,  # [N, BLOCKS] int32
    counts,  # [N] int32, 0 between launches
    drawn,  # [N] int64
    token_ids,  # [N] int64, becomes what was drawn
    positions,  # [N] int32, becomes the next
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + n * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
    z = tl.where(z == z, z, float("-inf"))  # a row without numbers still names a token
    top = tl.max(z, axis=0)
    tl.store(tops + n * BLOCKS + block, top)
    tl.store(ids + n * BLOCKS + block, tl.min(tl.where(z == top, i, V - 1), axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(counts + n, 1, sem="acq_rel")
    if arrived != BLOCKS - 1:
        return
    tl.store(counts + n, 0)
    b = tl.arange(0, BLOCKS_PAD)
    there = b < BLOCKS
    at = n * BLOCKS + b
    z = tl.load(tops + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    best = tl.load(ids + at, mask=there, other=V - 1, cache_modifier=".cg")
    token = tl.min(tl.where(z == tl.max(z, axis=0), best, V - 1), axis=0).to(tl.int64)
    tl.store(drawn + n, token)
    tl.store(token_ids + n, token)
    tl.store(positions + n, tl.load(positions + n) + 1)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Between the programs of `greedy`, for N lanes."""

    tops: Tensor
    ids: Tensor
    counts: Tensor

    @staticmethod
    def of(lanes: int, vocab_size: int, device: str) -> Scratch:
        blocks = triton.cdiv(vocab_size, BLOCK)
        return Scratch(
            torch.empty(lanes, blocks, dtype=torch.float32, device=device),
            torch.empty(lanes, blocks, dtype=torch.int32, device=device),
            torch.zeros(lanes, dtype=torch.int32, device=device),
        )


def greedy(
    logits: Tensor,
    scratch: Scratch,
    *,
    drawn: Tensor,
    token_ids: Tensor,
    positions: Tensor,
) -> None:
    """From logits [N, V]: `drawn` [N] int64, the likeliest, the lower of equal ids, NaN counting as
    the least; `token_ids` [N] int64, the same; `positions` [N] int32, one more."""
    N, V = logits.shape
    blocks = scratch.tops.shape[1]
    _greedy[(N, blocks)](
        logits, scratch.tops, scratch.ids, scratch.counts, drawn, token_ids, positions,
        V=V, BLOCKS=blocks, BLOCKS_PAD=triton.next_power_of_2(blocks), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    ranked: bool,
) -> Tensor:
    """Tokens [N] int64 from logits [N, V] float32, as `engine.sampling.choose` draws them.

    The others are [N, 1] float64, temperatures above 0. Without `ranked`, which sorts the
    vocabulary, top-k and top-p are not looked at. Where tokens of different logits have equal
    float32 weights, top-p ranks them by their logits.
    """
    V = logits.shape[1]
    wide = logits.double()
    weights = torch.exp((wide - wide.amax(1, keepdim=True)) / temperature)
    if ranked:
        order = torch.sort(logits, dim=1, descending=True, stable=True).indices
        among = weights.gather(1, order)
        ranks = torch.arange(V, device=logits.device)
        among = among * ((ranks < top_k) | (top_k <= 0))
        sums = among.cumsum(1)
        among = among * ((sums - among < top_p * sums[:, -1:]) | (top_p >= 1) | (ranks == 0))
        weights = torch.zeros_like(weights).scatter(1, order, among)
    weights = weights * (weights >= min_p)  # the greatest weight is 1
    steps = weights.cumsum(1)
    total = steps[:, -1:]
    # Tokens of weight 0 are flat steps, never hit; rounding at the very end is the one exception.
    hit = torch.minimum((steps <= uniform * total).sum(1), (steps < total).sum(1))
    return hit.clamp(0, V - 1)


AOT = {
    f"greedy {dtype}": (
        _greedy,
        {"logits": dtype, "tops": "*fp32", "ids": "*i32", "counts": "*i32"}
        | {"drawn": "*i64", "token_ids": "*i64", "positions": "*i32"},
        {"V": 151936, "BLOCKS": 38, "BLOCKS_PAD": 64, "BLOCK": BLOCK},
        {"num_warps": 8},
    )
    for dtype in ("*bf16", "*fp32")
}
