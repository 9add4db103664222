"""A child that times routers alone, each from float32 logits to expert ids and combine weights.

moescope's give scores, score sum, mass, entropy, margin and runner-up as well. Peers are what model
code does with torch, eager and compiled. `copy` is a bare copy of the logits: the least a router
could cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import child
import numpy as np

from moescope import kernels
from moescope.kernels.policy_rows import pack
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

Figures = dict[str, Any]
GROUPS, KEPT = 8, 4


class Routers:
    def load(self, threads: int) -> Figures:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        return {"threads": torch.get_num_threads()}

    def case(self, T: int, E: int, K: int, grouped: bool) -> Figures:
        """Prepare one case; says which contestants there are, and which are missing and why."""
        torch = self.torch
        logits = torch.randn((T, E), generator=torch.Generator().manual_seed(T + E))
        bias = torch.linspace(-0.1, 0.1, E) if grouped else None
        chain = _grouped(torch, bias, K) if grouped else _plain(torch, K)
        compiled = torch.compile(chain, dynamic=False)
        target = torch.empty_like(logits)
        self.ways: dict[str, Callable[[], Any]] = {
            "copy": lambda: target.copy_(logits),
            "torch eager": lambda: chain(logits),
            "torch.compile": lambda: compiled(logits),
        }
        spec = RouterSpec(RouterPolicy(**_policy(K, grouped)), RouterWiring(num_experts=E))
        missing: dict[str, str] = {}
        for name, make in WAYS.items():
            try:
                way = make(logits, spec, bias)
                way()
                self.ways[f"moescope {name}"] = way
            except Exception as error:  # not built, or not there
                missing[f"moescope {name}"] = f"{type(error).__name__}: {str(error)[:120]}"
        with torch.inference_mode():
            for way in self.ways.values():
                way()
        return {"ways": list(self.ways), "missing": missing}

    def time(self, seconds: float) -> Figures:
        """Microseconds a call of each contestant, which are called for `seconds` each."""
        with self.torch.inference_mode():
            return {name: _per_call(way, seconds) * 1e6 for name, way in self.ways.items()}


def _per_call(way: Callable[[], Any], seconds: float) -> float:
    """The median over blocks of calls."""
    began = time.perf_counter()
    way()
    once = time.perf_counter() - began
    calls = max(1, int(seconds / 10 / max(once, 1e-7)))
    blocks = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not blocks:
        began = time.perf_counter()
        for _ in range(calls):
            way()
        blocks.append((time.perf_counter() - began) / calls)
    return float(np.median(blocks))


def _policy(K: int, grouped: bool) -> Figures:
    if not grouped:
        return {"num_experts_per_tok": K}
    return {
        "num_experts_per_tok": K,
        "scoring_func": "sigmoid",
        "correction_bias": "score",
        "n_group": GROUPS,
        "topk_group": KEPT,
        "group_score": "top2_sum",
        "norm_topk_prob": True,
    }


def _plain(torch: Any, K: int) -> Callable[[Any], Any]:
    """Softmax, top-k: OLMoE's router."""

    def chain(logits: Any) -> Any:
        weights, ids = torch.topk(torch.softmax(logits, -1), K, -1)
        return ids, weights

    return chain


def _grouped(torch: Any, bias: Any, K: int) -> Callable[[Any], Any]:
    """Sigmoid, bias, groups by their two best, top-k, renormalised: DeepSeek-V3's router."""

    def chain(logits: Any) -> Any:
        scores = logits.sigmoid()
        biased = scores + bias
        by_group = biased.view(len(logits), GROUPS, -1)
        best = by_group.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(KEPT, -1, sorted=False)[1], 1)
        open_ = kept.unsqueeze(-1).expand_as(by_group).reshape_as(biased)
        ids = biased.masked_fill(open_ == 0, float("-inf")).topk(K, -1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20)

    return chain


def _call(logits: Any, spec: RouterSpec, bias: Any) -> Callable[[], Any]:
    """The C function alone on prepared buffers, as near as Python comes to how a step calls it."""
    from moescope.kernels import native_router

    T, E, K = *logits.shape, spec.K
    rows, of, array, bias = _arrays(logits, spec, bias)
    library = native_router.declare(native_router._library())
    results = [np.empty((T, width), np.int32) for width in (K, K, K, 4, 1)]
    scratch = np.empty(library.mk_route_scratch(E), np.uint8)
    held = (rows, of, array, bias, results, scratch)
    arguments = (
        -1,
        *(array.ctypes.data, E, T, E),
        *(rows.ctypes.data, 1, of.ctypes.data, 1),
        *(None if bias is None else bias.ctypes.data, 0),
        *(None, 0, None, 0),
        K,
        *(result.ctypes.data for result in (*results, scratch)),
    )
    return lambda held=held: library.mk_route_rows(*arguments)


def _native(logits: Any, spec: RouterSpec, bias: Any) -> Callable[[], Any]:
    """The same with arrays made and checked: numpy in, numpy out."""
    from moescope.kernels import native_router

    rows, of, array, bias = _arrays(logits, spec, bias)
    return lambda: native_router.route_rows(array, rows, of, spec.K, bias)


def _arrays(logits: Any, spec: RouterSpec, bias: Any) -> tuple[Any, Any, Any, Any]:
    rows = np.stack([pack(spec.resolved("float32"))])
    of = np.zeros((len(logits), 1), np.int32)
    return rows, of, logits.numpy(), None if bias is None else bias.numpy()[None]


def _routed(logits: Any, spec: RouterSpec, bias: Any) -> Callable[[], Any]:
    return lambda: kernels.route(logits, spec, correction_bias=bias, backend="torch")


WAYS = {"C call": _call, "native": _native, "route, torch": _routed}


def main() -> None:
    routers = Routers()
    child.serve({"load": routers.load, "case": routers.case, "time": routers.time})


if __name__ == "__main__":
    main()
