"""Trying other tiles on the device at hand, for benchmarks. Nothing here changes what is launched:
a benchmark passes what it found to `linear_small`, `experts_small` or `experts_grouped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from moescope.kernels.triton_ops.tiles import Block, ExpertTiles, Tile, expert_tiles, linear_tile

Choice = TypeVar("Choice", Tile, ExpertTiles, Block)


def linear_choices(outputs: int, width: int) -> list[Tile]:
    """Tiles worth trying for a weight [outputs, width]; the table's own first."""
    usual = linear_tile(outputs, width)
    return _around(usual, width)


def expert_choices(hidden: int, width: int) -> list[ExpertTiles]:
    """Gate-up is varied beside the table's down, then down beside the table's gate-up."""
    usual = expert_tiles(hidden, width)
    gate_up = [replace(usual, gate_up=tile) for tile in _around(usual.gate_up, hidden)]
    return gate_up + [replace(usual, down=tile) for tile in _around(usual.down, width)[1:]]


def grouped_choices() -> list[Block]:
    """Blocks for a prompt, from few rows an expert to many."""
    sizes = [(16, 64, 128), (16, 128, 64), (32, 64, 128), (64, 64, 64), (64, 128, 64)]
    sizes += [(128, 64, 64), (128, 128, 64)]
    return [Block(*size, 8 if size[0] == 128 else 4, stages) for size in sizes for stages in (3, 4)]


def _around(usual: Tile, width: int) -> list[Tile]:
    """Half and twice the rows, half and twice the warps; no thread without a value of a row."""
    most = max(1, triton.next_power_of_2(width) // (32 * 8))
    tiles = [usual]
    for rows in (usual.rows, usual.rows // 2, usual.rows * 2):
        for warps in (usual.warps, usual.warps // 2, usual.warps * 2):
            tile = Tile(rows, warps)
            if rows and 1 <= warps <= most and tile not in tiles:
                tiles.append(tile)
    return tiles


def fastest(
    choices: Sequence[Choice], measure: Callable[[Choice], float]
) -> tuple[Choice, dict[str, float]]:
    """The choice with the least `measure`, marked as tuned, and every measure by name. Choices
    the device has no room for are left out."""
    measured: dict[str, float] = {}
    best: tuple[float, Choice] | None = None
    for choice in choices:
        try:
            cost = measured[str(choice)] = measure(choice)
        except OutOfResources:
            continue
        if best is None or cost < best[0]:
            best = cost, choice
    assert best is not None, "no choice fits"
    return _tuned(best[1]), measured


def _tuned(choice: Choice) -> Choice:
    if isinstance(choice, ExpertTiles):
        gate_up, down = replace(choice.gate_up, tuned=True), replace(choice.down, tuned=True)
        return replace(choice, gate_up=gate_up, down=down)
    return replace(choice, tuned=True)


def graph_microseconds(launch: Callable[[int], object], calls: int = 20, rounds: int = 15) -> float:
    """Microseconds a call of `launch(n)`, n from 0 to `calls` - 1, in one CUDA graph: the median of
    `rounds` replays. Let n choose among weights that together exceed the cache."""
    launch(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            launch(n)
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[rounds // 2]
