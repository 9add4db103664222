"""What stands between a router's input and its gate: a small network, and what it hands on to the
router after it (ZAYA1)."""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.mlx_operators.activations import ACTIVATIONS
from moescope.engine.mlx_operators.common import Call, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.norms import load_norm
from moescope.engine.operators import GateNetwork


class MLXGateNetwork:
    """A narrow projection, to which what a router before this one had there is added; a norm and
    layers on the sum."""

    def __init__(self, spec: GateNetwork, weights: Weights, path: str) -> None:
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        names = ("gate.down", *(f"gate.layer_{number}" for number in range(spec.layers)))
        self.down, *self.layers = (
            (matrix(weights[f"{path}.{name}.weight"]), array(weights[f"{path}.{name}.bias"]))
            for name in names
        )
        self.carried = array(weights[f"{path}.gate.carried"]) if spec.reads else None
        self.norm = load_norm(spec.norm, weights, f"{path}.gate.norm")

    def __call__(self, x: mx.array, call: Call) -> mx.array:
        """x [R, H] -> what the gate reads [R, width]."""
        product, bias = self.down
        y = product(x, bias)
        if self.carried is not None:
            y = y + call.taps[self.spec.reads] * self.carried
        if self.spec.writes:
            call.taps[self.spec.writes] = y
        if self.norm is not None:
            y = self.norm(y)
        for product, bias in self.layers:
            y = self.activation(product(y, bias))
        return y
