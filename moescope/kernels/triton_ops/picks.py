"""Which experts the lanes of a small batch chose, as a kernel that walks over them asks. Letters: N
lanes, K picked, E experts; SLOTS and PICKS are powers of two that hold N × K and K."""

from __future__ import annotations

import triton
import triton.language as tl


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
def null_share(
    ids, weights, lanes, stride, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    PICKS: tl.constexpr,
):  # fmt: skip
    """Each lane's sum of weights of null experts, whose ids are those from E on: [LANES, 1]."""
    pick = tl.arange(0, PICKS)[None, :]
    there = (lanes < N) & (pick < K)
    null = tl.load(ids + lanes * stride + pick, mask=there, other=-1) >= E
    found = tl.load(weights + lanes * stride + pick, mask=null & there, other=0.0)
    return tl.sum(found, axis=1)[:, None]
