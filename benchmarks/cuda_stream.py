"""A Triton kernel that reads memory and does nothing else: the limit a decode step is held to."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, BLOCKS = 8192, 8
PROGRAM = BLOCK * BLOCKS  # float32 numbers that one program reads


@triton.jit
def read(source, target, BLOCK: tl.constexpr = BLOCK, BLOCKS: tl.constexpr = BLOCKS):
    """target[p] = sum of the p-th BLOCK × BLOCKS numbers."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(BLOCKS):
        total += tl.load(source + start + number * BLOCK + tl.arange(0, BLOCK))
    tl.store(target + tl.program_id(0), tl.sum(total))
