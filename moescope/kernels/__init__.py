"""Router kernels: arrays in, arrays out; no files, no models, no sibling of this package.

`route` picks the implementation: `reference` (numpy, the definition), `torch`, `native` (C, where
it was built) or `triton` (CUDA). Names are resolved on first use, so importing this package costs
neither numpy nor torch.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.kernels.agreement import compare
    from moescope.kernels.reference import gate_logits
    from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring, Routing

__all__ = [
    "RouterPolicy",
    "RouterSpec",
    "RouterWiring",
    "Routing",
    "compare",
    "gate_logits",
    "route",
]

_HOMES = {
    "RouterPolicy": "spec",
    "RouterSpec": "spec",
    "RouterWiring": "spec",
    "Routing": "spec",
    "compare": "agreement",
    "gate_logits": "reference",
}
_BACKENDS = {
    "reference": "reference",
    "torch": "torch_ops",
    "native": "native_router",
    "triton": "triton_ops.router",
}


def route(
    logits: Any,
    spec: RouterSpec,
    *,
    correction_bias: Any = None,
    per_expert_scale: Any = None,
    token_ids: Any = None,
    hash_table: Any = None,
    keep_logits: bool = False,
    backend: str = "reference",
) -> Routing:
    """What `spec` decides for T rows of router logits [T, E].

    Where the spec says `model`, the dtype is that of the logits (float32 for numpy's float64).
    `correction_bias` and `per_expert_scale` are [E], or [T, E] where rows are of several routers.
    Numpy in, numpy out, also with `native`; with `torch` and `triton`, tensors in and out, on their
    device. ValueError is raised for shapes that do not fit the spec, a missing input, E over 4096,
    and K over 64; RuntimeError where `native` was not built.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(_BACKENDS)}")
    module = import_module(f"{__name__}.{_BACKENDS[backend]}")
    spec = _resolved(spec, _dtype_of(logits))
    routing: Routing = getattr(module, f"route_{backend}")(
        logits,
        spec,
        correction_bias=correction_bias,
        per_expert_scale=per_expert_scale,
        token_ids=token_ids,
        hash_table=hash_table,
        keep_logits=keep_logits,
    )
    return routing


@lru_cache(maxsize=1024)
def _resolved(spec: RouterSpec, dtype: str) -> RouterSpec:
    return spec.resolved(dtype)


def _dtype_of(logits: Any) -> str:
    name = str(getattr(logits, "dtype", "float32")).removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "float32"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
