"""Every kernel of a decode step by itself: microseconds in a graph, and GB/s of what it must read.

Products and experts take turns through more weights than the cache holds, as a step does. Each is
tried with the tiles around the table's own; what was fastest is for whoever keeps that table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import cycle
from typing import Any

import cuda_clock as clock
import torch
from cuda_shapes import CONFIGS, begin, parser
from torch import Tensor

from moescope.engine import families
from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import Attention, MoE

CACHE = 512 << 20  # bytes of weights that no cache holds
POSITIONS = (128, 1024, 3500)
LANES = (1, 4)
Measure = Callable[[Callable[[], Any]], float]


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, _ = begin(asked)
    if asked.device == "cpu":
        import_module("tests.kernels.interpreted")
    report.put("bandwidth", clock.bandwidth(asked.device))
    calls = 20 if asked.device == "cuda" else 1
    measure = partial(clock.in_graph, device=asked.device, calls=calls, repeats=9)
    for shape in ("olmoe", "qwen3"):
        spec = families.build(CONFIGS[f"{shape} tiny" if asked.tiny else shape], "bfloat16")
        found: dict[str, Any] = {}
        for name, run in cases(spec, asked.device, asked.tiny, measure).items():
            try:
                found[name] = run()
            except Exception as error:
                found[name] = {"says": f"{type(error).__name__}: {error}"[:300]}
            report.put(shape, found, says=f"{name}: {found[name]}")
        torch.cuda.empty_cache()
    report.finish()


def cases(
    spec: DecoderSpec, device: str, tiny: bool, measure: Measure
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a kernel, with how many lanes -> its measurement."""
    attention, moe = (branch.operator for branch in spec.layers[0].branches)
    assert isinstance(attention, Attention) and isinstance(moe, MoE)
    heads = attention.heads * attention.head_dim
    rows = heads + 2 * attention.kv_heads * attention.head_dim
    products = {
        "qkv": (rows, spec.hidden),
        "o_proj": (spec.hidden, heads),
        "gate": (moe.router.E, spec.hidden),
        "head": (spec.vocab_size, spec.hidden),
    }
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for N in LANES[: 1 if tiny else None]:
        for name, (outputs, width) in products.items():
            found[f"{name}, {N}"] = partial(product, outputs, width, N, device, tiny, measure)
        found[f"experts, {N}"] = partial(experts, moe, N, device, tiny, measure)
    for position in POSITIONS[: 1 if tiny else None]:
        found[f"attention after {position}"] = partial(attend, attention, position, device, measure)
    found["greedy"] = partial(greedy, spec.vocab_size, device, measure)
    return found


def product(
    outputs: int, width: int, N: int, device: str, tiny: bool, measure: Measure
) -> dict[str, Any]:
    from moescope.kernels.triton_ops.gemv import linear_small
    from moescope.kernels.triton_ops.tuning import fastest, linear_choices

    size = outputs * width * 2
    weights = [
        normal(device, outputs, width) for _ in range(1 if tiny else max(2, -(-CACHE // size)))
    ]
    x, norm = normal(device, N, width), normal(device, width)
    turn = cycle(weights)

    def seconds(tile: Any) -> float:
        return measure(lambda: linear_small(x, next(turn), norm=norm, tile=tile))

    choices = linear_choices(outputs, width)
    best, measured = fastest(choices[: 1 if tiny else None], seconds)
    plain = measure(lambda: torch.nn.functional.linear(x, next(turn)))
    return told(measured, best, size) | {"torch_microseconds": plain * 1e6}


def experts(moe: MoE, N: int, device: str, tiny: bool, measure: Measure) -> dict[str, Any]:
    from moescope.kernels.triton_ops.experts import experts_small
    from moescope.kernels.triton_ops.tuning import expert_choices, fastest

    E, K, H, width = moe.router.E, moe.router.K, moe.hidden, moe.experts.width
    gate_up, down = normal(device, E, 2 * width, H), normal(device, E, H, width)
    h, weights = normal(device, N, H), torch.full((N, K), 1 / K, device=device)
    chosen = [
        torch.stack([torch.randperm(E, device=device)[:K] for _ in range(N)]).int()
        for _ in range(20)
    ]
    turn = cycle(chosen)

    def seconds(tiles: Any) -> float:
        return measure(lambda: experts_small(h, gate_up, down, next(turn), weights, tiles=tiles))

    choices = expert_choices(H, width)
    best, measured = fastest(choices[: 1 if tiny else None], seconds)
    distinct = sum(len(ids.unique()) for ids in chosen) / len(chosen)
    return told(measured, best, int(distinct * 3 * width * H * 2))


def told(measured: dict[str, float], best: Any, size: int) -> dict[str, Any]:
    """Of the table's own choice, which is measured first, and of the fastest."""
    usual = next(iter(measured.values()))
    least = min(measured.values())
    return {
        "microseconds": usual * 1e6,
        "gigabytes_per_second": size / usual / 1e9,
        "fastest": {
            "tile": str(best),
            "microseconds": least * 1e6,
            "gigabytes_per_second": size / least / 1e9,
        },
        "tried": {name: seconds * 1e6 for name, seconds in measured.items()},
    }


def attend(spec: Attention, position: int, device: str, measure: Measure) -> dict[str, Any]:
    """One lane; layers take turns through caches of their own."""
    from moescope.engine.graph_attention import attention_shape
    from moescope.kernels.triton_ops.attention import Scratch
    from moescope.kernels.triton_ops.attention import attend as run

    shape, D = attention_shape(spec), spec.head_dim
    processors = (
        torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 8
    )
    scratch = Scratch.of([shape], 1, device, processors)
    capacity = 4096
    caches = cycle([normal(device, 2, 1, spec.kv_heads, capacity, D) for _ in range(8)])
    qkv = normal(device, 1, (spec.heads + 2 * spec.kv_heads) * D)
    flat = spec.qk_norm_over == "flat"
    norms = [normal(device, (count if flat else 1) * D) for count in (spec.heads, spec.kv_heads)]
    turns = normal(device, capacity, D), normal(device, capacity, D)
    lanes, at = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, position))
    out = normal(device, 1, spec.heads * D)
    weights = (norms[0], norms[1]) if spec.qk_norm is not None else None
    seconds = measure(
        lambda: run(
            qkv, *next(caches), lanes, at, shape, scratch, weights=weights, rotation=turns, out=out
        )
    )
    size = 2 * spec.kv_heads * position * D * 2
    return {"microseconds": seconds * 1e6, "gigabytes_per_second": size / seconds / 1e9}


def greedy(vocabulary: int, device: str, measure: Measure) -> dict[str, Any]:
    from moescope.kernels.triton_ops.sampling import Scratch
    from moescope.kernels.triton_ops.sampling import greedy as run

    logits = normal(device, 1, vocabulary).float()
    scratch = Scratch.of(1, vocabulary, device)
    drawn, ids = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    at = torch.zeros(1, dtype=torch.int32, device=device)
    seconds = measure(lambda: run(logits, scratch, drawn=drawn, token_ids=ids, positions=at))
    return {"microseconds": seconds * 1e6}


def normal(device: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, shape[-1] ** -0.5)


if __name__ == "__main__":
    main()
