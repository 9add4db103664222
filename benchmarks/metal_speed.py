"""What the chip can read, and how long a router takes: `bandwidth` or `router`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from metal_steps import Figures, begin

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring
from moescope.kernels.mlx_ops import fields_of, gate_and_route_mlx, route_mlx
from moescope.kernels.policy_rows import pack

SIZES = ((1, 64, 8), (1, 128, 8), (1, 256, 8), (512, 128, 8))  # T, E, K
GATES = ((2048, 64), (2048, 128), (7168, 256))  # H, E
CHAIN, REPEATS = 64, 15


def main() -> int:
    asked, put = begin(__doc__, "what")
    put({"bandwidth": bandwidth, "router": router}[asked.what](asked.tiny))
    return 0


def bandwidth(tiny: bool) -> Figures:
    """GB/s of three ways to read an array that no cache holds; the fastest is the limit, so that no
    engine looks better for want of a good way to read."""
    size = 1 << 22 if tiny else 1 << 31
    columns = 2048
    matrix = mx.ones((size // 2 // columns, columns), mx.bfloat16)
    vector, floats = mx.ones((columns,), mx.bfloat16), mx.ones((size // 4,))
    mx.eval(matrix, vector, floats)
    ways: dict[str, Callable[[], mx.array]] = {
        "sum of float32": floats.sum,
        "sum of bfloat16": matrix.sum,
        "bfloat16 matrix times vector": lambda: matrix @ vector,
    }
    found = {name: size / median(way) / 1e9 for name, way in ways.items()}
    print(found, flush=True)
    return {"gb_s": max(found.values()), "ways": found, "bytes": size}


def median(way: Callable[[], Any]) -> float:
    """Seconds of one evaluation."""
    mx.eval(way())
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        mx.eval(way())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def router(tiny: bool) -> Figures:
    """Microseconds of a router in a chain of them, each waiting for the one before, less those of
    the chain alone: the Metal kernel, its twin, and what mlx-lm's models do."""
    figures: Figures = {"on": "metal" if mx.metal.is_available() else "cpu, plain operators"}
    for T, E, K in SIZES[: 1 if tiny else None]:
        figures[f"{T} {E} {K}"] = routers(T, E, K, tiny)
        print(f"{T} {E} {K}: {figures[f'{T} {E} {K}']}", flush=True)
    for H, E in GATES[: 1 if tiny else None]:
        figures[f"gate {H}x{E}"] = gates(H, E, tiny)
        print(f"gate {H}x{E}: {figures[f'gate {H}x{E}']}", flush=True)
    return figures


def rows_of(E: int, K: int) -> np.ndarray:
    policy = RouterPolicy(K, norm_topk_prob=True)
    return pack(RouterSpec(policy, RouterWiring(E)).resolved("bfloat16"))[None].astype(np.float32)


def routers(T: int, E: int, K: int, tiny: bool) -> Figures:
    rows = rows_of(E, K)
    policies, fields = mx.array(rows), fields_of(rows, E)
    x = mx.array(np.random.default_rng(0).normal(size=(T, E)).astype(np.float32))
    x = x.astype(mx.bfloat16)

    def ours(x: mx.array, **options: Any) -> mx.array:
        return route_mlx(x, policies, K, **options).score_sum

    def theirs(x: mx.array) -> mx.array:
        scores = mx.softmax(x, -1, precise=True)
        ids = mx.argpartition(scores, kth=-K, axis=-1)[..., -K:]
        picked = mx.take_along_axis(scores, ids, axis=-1)
        return (picked / picked.sum(-1, keepdims=True)).sum(-1) + 0 * ids.sum(-1)

    chain = 2 if tiny else CHAIN
    found = {
        "plain": micros(lambda x: ours(x, use_metal=False, fields=fields), x, chain),
        "mlx_lm": micros(theirs, x, chain),
    }
    if mx.metal.is_available():
        found["metal"] = micros(lambda x: ours(x, use_metal=True), x, chain)
        found["speedup"] = found["mlx_lm"] / max(found["metal"], 1e-3)
    return found


def gates(H: int, E: int, tiny: bool) -> Figures:
    """Gate and router in one launch of several sizes, beside a product and a launch."""
    policies = mx.array(rows_of(E, 8))
    rng = np.random.default_rng(0)
    x, gate = (
        mx.array(rng.normal(size=s).astype(np.float32)).astype(mx.bfloat16)
        for s in ((1, H), (E, H))
    )
    on, chain = mx.metal.is_available(), 2 if tiny else CHAIN

    def apart(x: mx.array) -> mx.array:
        return route_mlx(x @ gate.T, policies, 8, use_metal=on).score_sum

    found = {"apart": micros(apart, x, chain)}
    if on:
        for groups in (4, 8, 16, 32):

            def together(x: mx.array, groups: int = groups) -> mx.array:
                options: dict[str, Any] = {"router_dtype": "bfloat16", "simdgroups": groups}
                return gate_and_route_mlx(x, gate, policies, 8, use_metal=True, **options).score_sum

            try:
                found[f"together, {groups} simdgroups"] = micros(together, x, chain)
            except ValueError as error:  # more threads than this chip gives the kernel
                print(f"{groups} simdgroups: {error}", flush=True)
        best = min(value for name, value in found.items() if name != "apart")
        found["speedup"] = found["apart"] / max(best, 1e-3)
    return found


def micros(step: Callable[[mx.array], mx.array], x: mx.array, chain: int) -> float:
    def run(step: Callable[[mx.array], mx.array]) -> Callable[[], mx.array]:
        def way() -> mx.array:
            y = x
            for _ in range(chain):
                y = x + (0 * step(y)[..., None]).astype(x.dtype)
            return y

        return way

    mx.eval(x)
    alone = median(run(lambda y: y[..., 0]))
    return max(0.0, median(run(step)) - alone) / chain * 1e6


if __name__ == "__main__":
    sys.exit(main())
