"""What stands between a router's input and its gate: a small network, and what it hands on to the
router after it (ZAYA1)."""

from __future__ import annotations

from torch import Tensor

from moescope.engine.operators import GateNetwork
from moescope.engine.torch_operators.common import Call, Weights, linear
from moescope.engine.torch_operators.mlp import ACTIVATIONS
from moescope.engine.torch_operators.norms import load_norm


class TorchGateNetwork:
    """A narrow projection, to which what a router before this one had there is added; a norm and
    layers on the sum. The taps are those of the call, so nothing of a token outlives its call."""

    def __init__(self, spec: GateNetwork, weights: Weights, path: str) -> None:
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        self.down = weights[f"{path}.gate.down.weight"], weights[f"{path}.gate.down.bias"]
        self.carried = weights.get(f"{path}.gate.carried")
        self.norm = load_norm(spec.norm, weights, f"{path}.gate.norm")
        self.layers = [
            tuple(weights[f"{path}.gate.layer_{number}.{kind}"] for kind in ("weight", "bias"))
            for number in range(spec.layers)
        ]

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """x [R, H] -> what the gate reads [R, width]."""
        inner = linear(x, *self.down)
        if self.spec.reads:
            assert self.carried is not None
            inner = inner + call.taps[self.spec.reads] * self.carried
        if self.spec.writes:
            call.taps[self.spec.writes] = inner
        y = inner if self.norm is None else self.norm(inner)
        for weight, bias in self.layers:
            y = self.activation(linear(y, weight, bias))
        return y
