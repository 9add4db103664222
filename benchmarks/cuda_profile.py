"""Which kernels a decode step launches, how often a layer, and how long each takes.

From torch's profiler, where it sees the device; what it costs itself is why these times are not
used for rates.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from cuda_loops import Lanes

NAMES = 40


def profile(lanes: Lanes, layers: int, steps: int) -> dict[str, Any]:
    """Kernels by total time; `says` why there are none."""
    if lanes.decoder.device == "cpu":
        return {"says": "a CPU has no kernels to count"}
    try:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as watched

        with watched(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            lanes.go(steps)
            torch.cuda.synchronize()
        events = [e for e in found.key_averages() if _device_time(e) > 0 and _is_kernel(e)]
    except Exception as error:  # a profiler that is not there must cost nothing else
        return {"says": f"{type(error).__name__}: {error}"[:300]}
    if not events:
        return {"says": "the profiler saw no kernels (no Kineto here, or no access to counters)"}
    events.sort(key=_device_time, reverse=True)
    launches = sum(e.count for e in events) / steps
    return {
        "launches_per_step": launches,
        "launches_per_layer": launches / layers,
        "microseconds_per_step": sum(map(_device_time, events)) / steps,
        "kernels": [
            {
                "name": e.key[:100],
                "per_step": e.count / steps,
                "microseconds_each": _device_time(e) / e.count,
                "microseconds_per_step": _device_time(e) / steps,
            }
            for e in events[:NAMES]
        ],
    }


def _device_time(event: Any) -> float:
    """Microseconds; the name changed with torch 2.4."""
    for name in ("self_device_time_total", "self_cuda_time_total"):
        if (value := getattr(event, name, None)) is not None:
            return float(value)
    return 0.0


def _is_kernel(event: Any) -> bool:
    """Work on the device, not the operator on the host that asked for it."""
    return "CUDA" in str(getattr(event, "device_type", "CUDA"))


def graph_nodes(step: Any, *, logits: bool) -> int:
    """Nodes of the graph of one greedy lane, with or without the routers' logits in its record.
    What it launches must have run before; nothing runs here."""
    from moescope.engine.graph_step import Kind

    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.inference_mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step._forward(Kind(1, 0, logits, "greedy"), 0)
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    code = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count))
    if code != 0:
        raise RuntimeError(f"cuGraphGetNodes: error {code}")
    return count.value
