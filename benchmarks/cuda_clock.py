"""Timing on a device and on a CPU: work inside a graph, blocks that take turns, bandwidth.

Everything is a median. Rates that are compared come from blocks that took turns in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Work, device: str) -> float:
    """Seconds until `work` is done, on a wall clock."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def median_time(work: Work, device: str, *, repeats: int = 7, warm: int = 2) -> float:
    for _ in range(warm):
        work()
    return statistics.median(timed(work, device) for _ in range(repeats))


def by_turns(
    works: Mapping[str, Work], device: str, rounds: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each of `works`, `rounds` times, one after another in changing order."""
    for work in works.values():
        for _ in range(warm):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        names = list(works) if number % 2 else list(works)[::-1]
        for name in names:
            seconds[name].append(timed(works[name], device))
    return seconds


def captured(work: Work) -> torch.cuda.CUDAGraph:
    """`work` as a graph. It runs three times before, on another stream, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def in_graph(work: Work, device: str, *, calls: int = 64, repeats: int = 21) -> float:
    """Seconds of one call of `work` among `calls` of them in one graph, without launch gaps of the
    host. On a CPU: of one plain call."""

    def many() -> None:
        for _ in range(calls):
            work()

    if device != "cuda":
        return median_time(many, device, repeats=2, warm=0) / calls
    graph = captured(many)
    return median_of_events(graph.replay, repeats=repeats) / calls


def median_of_events(work: Work, *, repeats: int = 21, warm: int = 3) -> float:
    """Seconds of `work` on the device's own clock."""
    for _ in range(warm):
        work()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


# --- bandwidth ------------------------------------------------------------------------------------


def bandwidth(device: str, size: int = 8 << 30) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of reads, in several ways; `best` of them all."""
    found = _rates(device, size if device == "cuda" else 64 << 20)
    torch.cuda.empty_cache()
    return found | {"best": max(found.values())}


def _rates(device: str, size: int) -> dict[str, float]:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    matrix = source.view(torch.bfloat16).view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.bfloat16, device=device)
    ways: dict[str, tuple[int, Work]] = {
        "copy": (2 * size, lambda: target.copy_(source)),
        "sum": (size, lambda: source.sum()),
        "matrix-vector": (size, lambda: torch.mv(matrix, vector)),
    }
    with suppress(ImportError, RuntimeError):
        ways["stream"] = (size, _stream(source, target))
    found: dict[str, float] = {}
    for name, (count, work) in ways.items():
        clock = median_of_events if device == "cuda" else lambda w: median_time(w, device)
        with suppress(torch.OutOfMemoryError):
            found[name] = count / clock(work) / 1e9
    return found


def _stream(source: Tensor, target: Tensor) -> Work:
    """A kernel that only reads: each program sums a stretch, and writes one number."""
    if source.device.type != "cuda":
        raise RuntimeError("a device's kernel")
    from cuda_stream import PROGRAM, read

    programs = source.numel() // PROGRAM
    return lambda: read[(programs,)](source, target, num_warps=8)
