"""moescope: watch a Mixture-of-Experts language model route, token by token.

The public Python API. Names are imported when they are first used, so that `import moescope` costs
nothing: `moescope.route(logits, spec)`, `moescope.load_model(request)`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MoescopeError": "moescope.errors",
    "RouterPolicy": "moescope.kernels.spec",
    "RouterSpec": "moescope.kernels.spec",
    "RouterWiring": "moescope.kernels.spec",
    "Routing": "moescope.kernels.spec",
    "route": "moescope.kernels",
    "Frame": "moescope.trace.frames",
    "TraceMeta": "moescope.trace.frames",
    "TraceReader": "moescope.trace.store",
    "TraceWriter": "moescope.trace.store",
    "convert": "moescope.trace.formats",
    "Checkpoint": "moescope.engine.checkpoint",
    "Generate": "moescope.engine.protocol",
    "LoadRequest": "moescope.engine.protocol",
    "Sampling": "moescope.engine.protocol",
    "Session": "moescope.engine.session",
    "load_model": "moescope.engine.load",
    "open_model": "moescope.engine.opening",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moescope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
