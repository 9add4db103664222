"""What the routers of one run decided: stacked into few arrays on the device, and numpy from them.

Every array that is evaluated costs a little, so all integers go into one and all floats into
another: [L, R, P, columns]. Routers may differ in K and E; what is missing is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import StepOutput
from moescope.engine.mlx_operators.common import Static
from moescope.kernels.spec import Routing
from moescope.kernels.twins import Difference, Picks, difference
from moescope.trace.frames import RecordLevel

SUMS = ("score_sum", "mass", "entropy", "margin")


def stacked(routings: Sequence[Routing]) -> list[mx.array]:
    """Integers [L, R, P, 1 + K]: the runner-up, then the picks; floats [L, R, P, 4 + 2K]: sums,
    weights, scores; and logits [L, R, E] where they were kept."""
    K = max(routing.expert_ids.shape[-1] for routing in routings)

    def whole(name: str, fill: float = 0.0, width: int = K) -> mx.array:
        return mx.stack([_widened(getattr(routing, name), width, fill) for routing in routings])

    def single(name: str) -> mx.array:
        return mx.stack([getattr(routing, name) for routing in routings])[..., None]

    integers = [single("runner_up"), whole("expert_ids", -1)]
    floats = [*map(single, SUMS), whole("weights"), whole("scores")]
    found = [mx.concatenate(integers, -1), mx.concatenate(floats, -1)]
    if routings[0].logits is not None:
        E = max(routing.logits.shape[-1] for routing in routings)
        found.append(whole("logits", float("nan"), E))
    return found


def _widened(x: mx.array, width: int, fill: float) -> mx.array:
    missing = width - x.shape[-1]
    if not missing:
        return x
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)


def output(
    logits: mx.array, whole: Sequence[mx.array], static: Static, record: RecordLevel, shadow_K: int
) -> StepOutput:
    """The evaluated arrays of a run of N lanes, as numpy. `logits` are [N, T or 1, V]; `shadow_K`
    is how many picks the widest shadow has."""
    N, T = len(static.lanes), static.tokens
    wanted = record != "ids"
    integers, floats = (np.array(a) for a in whole[:2])  # [L, R, P, columns]
    K = floats.shape[-1] // 2 - 2

    def own(a: NDArray[Any], columns: slice | int, dtype: Any) -> NDArray[Any]:
        """Of the policy in force: [N, T, L, ...]."""
        part = a[:, :, 0, columns].swapaxes(0, 1)
        return np.ascontiguousarray(part.reshape(N, T, *part.shape[1:]), dtype=dtype)

    def shadows(a: NDArray[Any], columns: slice | int, dtype: Any) -> NDArray[Any] | None:
        """[N, T, S, L, ...]."""
        if not static.shadows:
            return None
        part = a[:, :, 1:, columns].swapaxes(0, 1).swapaxes(1, 2)
        return np.ascontiguousarray(part.reshape(N, T, *part.shape[1:]), dtype=dtype)

    picks = max(static.picks)
    invalid = (integers[:, :, 0, 1] < 0).any(1)  # of each router
    router_logits = None
    if record == "logits":
        router_logits = np.array(whole[2]).swapaxes(0, 1)
        router_logits = router_logits.reshape(N, T, *router_logits.shape[1:])
    return StepOutput(
        logits=np.array(logits.astype(mx.float32)),
        expert_ids=own(integers, slice(1, 1 + picks), np.int16),
        score_sum=own(floats, 0, np.float32),
        mass=own(floats, 1, np.float32),
        entropy=own(floats, 2, np.float32),
        margin=own(floats, 3, np.float32),
        runner_up=own(integers, 0, np.int16),
        weights=own(floats, slice(4, 4 + picks), np.float32) if wanted else None,
        scores=own(floats, slice(4 + K, 4 + K + picks), np.float32) if wanted else None,
        router_logits=router_logits,
        invalid_router=int(invalid.argmax()) if invalid.any() else None,
        shadow_ids=shadows(integers, slice(1, 1 + shadow_K), np.int16),
        shadow_weights=shadows(floats, slice(4, 4 + shadow_K), np.float32) if wanted else None,
        shadow_sums=shadows(floats, 0, np.float32),
    )


def apart(slow: Sequence[mx.array], kernel: Sequence[mx.array]) -> Difference:
    """Between two routings of the same rows, each the evaluated integers and floats."""
    picks = []
    for integers, floats in (slow, kernel):
        K = floats.shape[-1] // 2 - 2
        ids, weights = np.array(integers)[..., 1:], np.array(floats)[..., 4 : 4 + K]
        picks.append(Picks(ids.reshape(-1, K), weights.reshape(-1, K)))
    return difference(*picks)
