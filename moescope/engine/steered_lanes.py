"""Steered lanes of an interpreter: per lane what is steered (`moescope.variants.steering`), and the
intervention that executes it, whichever interpreter runs.

Rows of a steered lane are routed again from the logits that the gate gave, with a bias on the
choice, and their weights are then scaled or left out: `torch_steering.py`, `mlx_steering.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moescope.engine.lane import Steered
from moescope.kernels.spec import RouterSpec, Routing
from moescope.variants.steering import Steering

# routing of all rows, the rows to steer, the spec in force, what is steered, the running router
Execute = Callable[[Routing, slice, RouterSpec, Steering, Any], Routing]


def steer(interpreter: Any, lane: int, steered: Steered | None) -> None:
    """From the next call on, steer `lane` as `lane.steering_of` says; None: no longer."""
    steerer = _held(interpreter)
    if steered is not None:
        if steerer is None:
            steerer = Steerer(_execute(interpreter))
            _replace(interpreter, None, steerer)
        steerer.lanes[lane] = steered
    elif steerer is not None and lane in steerer.lanes:
        del steerer.lanes[lane]
        if not steerer.lanes:
            _replace(interpreter, steerer, None)


def steered_now(interpreter: Any, lane: int) -> Steered | None:
    """What `lane` is steered by."""
    steerer = _held(interpreter)
    return None if steerer is None else steerer.lanes.get(lane)


def _execute(interpreter: Any) -> Execute:
    if interpreter.device == "mlx":
        from moescope.engine import mlx_steering

        return mlx_steering.execute
    from moescope.engine import torch_steering

    return torch_steering.execute


def _held(interpreter: Any) -> Steerer | None:
    """The steerer in force, also behind observers."""
    found = getattr(interpreter, "intervene", None)
    while found is not None and not isinstance(found, Steerer):
        found = getattr(found, "before", None)
    return found


def _replace(interpreter: Any, old: Steerer | None, new: Steerer | None) -> None:
    """Put `new` where `old` is, or behind the last observer where there is none."""
    front = interpreter.intervene
    if front is old:
        interpreter.set_intervention(new)
        return
    while hasattr(front, "before") and front.before is not old:
        front = front.before
    if hasattr(front, "before"):
        front.before = new


class Steerer:
    """The intervention: steered lanes with, per router, what is steered and the spec in force."""

    def __init__(self, execute: Execute) -> None:
        self.execute = execute
        self.lanes: dict[int, Steered] = {}

    def __call__(self, router: Any, x: Any, routing: Routing, call: Any) -> Routing:
        for lane, _, rows in call.spans():
            if lane not in self.lanes:
                continue
            steerings, specs = self.lanes[lane]
            steering = steerings[router.index]
            if steering is not None:
                routing = self.execute(routing, rows, specs[router.index], steering, router)
        return routing
