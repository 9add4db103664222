"""What the routers of one call decided, as numpy: `StepOutput` from the routings of a `Call`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moescope.engine.interpreter import StepOutput
from moescope.engine.torch_operators.common import Call
from moescope.kernels.spec import Routing
from moescope.trace.frames import RecordLevel


def collect(call: Call, logits: Tensor, record: RecordLevel) -> StepOutput:
    """What the routers decided, as numpy [N, T, L, ...]; shadows [N, T, S, L, ...]."""
    shape = (len(call.lanes), call.tokens)

    def stacked(routings: list[Routing], name: str, dtype: Any) -> NDArray[Any]:
        parts = _aligned([getattr(routing, name).to(logits.device) for routing in routings], name)
        whole = torch.stack(parts, 1).cpu().numpy()  # [R, L, ...]
        return whole.reshape(*shape, *whole.shape[1:]).astype(dtype, copy=False)

    def own(name: str, dtype: Any = np.float32) -> NDArray[Any]:
        return stacked(call.routings, name, dtype)

    def shadowed(name: str, dtype: Any = np.float32) -> NDArray[Any] | None:
        """The shadows' routings, which stand router by router."""
        if not call.shadows:
            return None
        flat = [routing for routings in call.shadow_routings for routing in routings]
        whole = stacked(flat, name, dtype)
        apart = whole.reshape(*shape, -1, len(call.shadows), *whole.shape[3:])
        return apart.swapaxes(2, 3)

    ids = own("expert_ids", np.int16)
    invalid = (ids[..., 0] < 0).any(axis=(0, 1))
    wanted = record != "ids"
    return StepOutput(
        logits=logits.float().cpu().numpy(),
        expert_ids=ids,
        score_sum=own("score_sum"),
        mass=own("mass"),
        entropy=own("entropy"),
        margin=own("margin"),
        runner_up=own("runner_up", np.int16),
        weights=own("weights") if wanted else None,
        scores=own("scores") if wanted else None,
        router_logits=own("logits") if record == "logits" else None,
        invalid_router=int(invalid.argmax()) if invalid.any() else None,
        shadow_ids=shadowed("expert_ids", np.int16),
        shadow_weights=shadowed("weights") if wanted else None,
        shadow_sums=shadowed("score_sum"),
    )


_FILLS: dict[str, float] = {"expert_ids": -1, "logits": float("nan")}


def _aligned(parts: list[Tensor], name: str) -> list[Tensor]:
    """Routers may differ in K and E: pad the last dimension to the largest."""
    if parts[0].ndim == 1:
        return parts
    widest = max(part.shape[-1] for part in parts)
    fill = _FILLS.get(name, 0.0)
    return [
        part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]), value=fill)
        for part in parts
    ]
