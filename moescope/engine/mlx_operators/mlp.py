"""The dense feed-forward block."""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.mlx_operators.activations import make_activation
from moescope.engine.mlx_operators.common import Call, Stateless, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.operators import MLP


class MLXMLP(Stateless):
    """A dense block, with or without a gate."""

    def __init__(self, spec: MLP, weights: Weights, path: str) -> None:
        self.activation = make_activation(spec)
        self.gate_up = matrix(weights[f"{path}gate_up.weight"])
        self.down = matrix(weights[f"{path}down_proj.weight"])
        self.gate_up_bias, self.down_bias = (
            array(weights[f"{path}{name}.bias"]) if spec.bias else None
            for name in ("gate_up", "down_proj")
        )

    def __call__(self, h: mx.array, call: Call | None = None) -> mx.array:
        return self.down(self.activation(self.gate_up(h, self.gate_up_bias)), self.down_bias)
