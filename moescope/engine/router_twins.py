"""The router's slow twin beside its kernel: which runs, and how far the two are apart.

Where a fused step routes in C or in Triton, the torch operators can route instead; the kernel then
routes the same logits beside them, and nothing of that is executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moescope.engine.torch_operators.common import Call
from moescope.kernels import route
from moescope.kernels.spec import Routing
from moescope.kernels.twins import Difference, Picks, difference

BACKENDS = ("native", "triton")  # of `kernels.route`; what a step calls its router begins so


class RouterTwins:
    """Sees every routing of the torch operators, and routes its logits in the kernel too."""

    def __init__(self, kernel: str) -> None:
        self.backend = backend_of(kernel)
        self.apart = Difference()

    def before(self, intervene: Callable[..., Routing] | None) -> Callable[..., Routing]:
        """For `Call.intervene`: see a decision, then let whoever intervenes have it."""

        def see(router: Any, x: Any, routing: Routing, call: Call) -> Routing:
            self.see(router, routing, call)
            return routing if intervene is None else intervene(router, x, routing, call)

        return see

    def see(self, router: Any, routing: Routing, call: Call) -> None:
        """`routing` [R, K], with its logits, under the specs of the call's groups."""
        for spec, rows in call.groups[router.index]:
            at = slice(None) if rows is None else rows
            logits = routing.logits[at]
            policy = spec.policy
            inputs: dict[str, Any] = {
                "correction_bias": router.correction_bias
                if policy.correction_bias != "none"
                else None,
                "per_expert_scale": router.per_expert_scale if policy.per_expert_scale else None,
            }
            if self.backend == "native":
                logits = logits.float().numpy()
                inputs = {k: None if v is None else v.float().numpy() for k, v in inputs.items()}
            kernel = route(logits, spec, backend=self.backend, **inputs)
            slow = routing.expert_ids[at][:, : spec.K], routing.weights[at][:, : spec.K]
            self.apart += difference(_here(kernel.expert_ids, kernel.weights), _here(*slow))


def backend_of(kernel: str) -> str:
    """The backend of `kernels.route` that is the kernel a step names, or ""."""
    return next((name for name in BACKENDS if kernel.startswith(name)), "")


def _here(ids: Any, weights: Any) -> Picks:
    """In numpy, from whatever device."""
    return Picks(*(np.asarray(a.cpu() if hasattr(a, "cpu") else a) for a in (ids, weights)))
