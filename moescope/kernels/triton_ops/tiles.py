"""How large a piece of each product one program takes: tables by shape, chosen without measuring.

`linear_small`, `experts_small` and `experts_grouped` look here unless they are given tiles;
`tuning` measures others on a device, for benchmarks. `configuration` is what a trace records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

WIDEST = 16384  # columns of a row that a program can hold


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` whole rows of a weight in one program of `warps` warps."""

    rows: int
    warps: int
    tuned: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows by {self.warps} warps{_how(self.tuned)}"


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """Of gate-up, `rows` rows of the gate and as many of up; of down, `rows` outputs."""

    gate_up: Tile
    down: Tile


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a grouped product: rows × columns of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tuned: bool = False

    def __str__(self) -> str:
        sizes = f"{self.rows} × {self.columns} × {self.depth}"
        return f"{sizes} by {self.warps} warps, {self.stages} stages{_how(self.tuned)}"


def _how(tuned: bool) -> str:
    return ", tuned" if tuned else ", not tuned"


# Rows of the weight, at least -> rows of a program: several programs for each of 132 processors.
LINEAR_ROWS = ((16384, 8), (1536, 4), (512, 2), (0, 1))
# Columns of the weight, at most -> rows of a program at most: they are held in registers.
WIDE_ROWS = ((4096, 8), (8192, 4), (WIDEST, 2))
# Columns, at most -> rows of gate (and of up), rows of down; rows of two experts are held.
EXPERT_ROWS = ((1024, 4, 4), (2048, 2, 4), (4096, 2, 2), (WIDEST, 1, 1))
# Rows an expert gets on average, at most -> the block of a grouped product in a two-byte dtype.
GROUPED = (
    (16, Block(16, 64, 128, 4, 4)),
    (48, Block(32, 64, 128, 4, 4)),
    (96, Block(64, 64, 64, 4, 4)),
    (float("inf"), Block(128, 64, 64, 8, 3)),
)


def linear_tile(outputs: int, width: int) -> Tile:
    """For a weight [outputs, width]."""
    rows = next(rows for least, rows in LINEAR_ROWS if outputs >= least)
    most = next(rows for widest, rows in WIDE_ROWS if width <= widest)
    return Tile(min(rows, most), warps_for(width))


def expert_tiles(hidden: int, width: int) -> ExpertTiles:
    """For experts of this hidden and inner width."""
    gate_rows = next(gate for widest, gate, _ in EXPERT_ROWS if hidden <= widest)
    down_rows = next(down for widest, _, down in EXPERT_ROWS if width <= widest)
    return ExpertTiles(Tile(gate_rows, warps_for(hidden)), Tile(down_rows, warps_for(width)))


def warps_for(width: int) -> int:
    """16 values of each row to a thread: two loads of 16 bytes in two-byte dtypes."""
    return max(1, min(16, triton.next_power_of_2(width) // (32 * 16)))


def grouped_block(rows: int, experts: int, dtype: torch.dtype) -> Block:
    """For `rows` picks over all experts. Half as deep in float32, and one stage less on ROCm, whose
    shared memory is a quarter of Hopper's."""
    found = next(block for most, block in GROUPED if rows <= most * experts)
    depth = found.depth // 2 if dtype is torch.float32 else found.depth
    stages = 2 if torch.version.hip else found.stages
    return Block(found.rows, found.columns, depth, found.warps, stages)


def configuration(
    hidden: int,
    width: int,
    vocabulary: int,
    *,
    tiles: ExpertTiles | None = None,
    head: Tile | None = None,
) -> dict[str, str]:
    """Operator -> its kernel and tiles, for a decoder of these sizes (`width`: of an expert)."""
    tiles = tiles or expert_tiles(hidden, width)
    return {
        "linear": f"triton gemv: {linear_tile(hidden, hidden)}",
        "experts": f"triton gemv: gate-up {tiles.gate_up}; down {tiles.down}",
        "head": f"triton gemv: {head or linear_tile(vocabulary, hidden)}",
    }
