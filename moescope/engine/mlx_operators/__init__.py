"""The operators of `DecoderSpec` on MLX arrays: one small class each, built once per layer.

An operator is called with the hidden state after its branch's norm [R, H] and the `Call`, and gives
[R, H]. It keeps no arrays of its own but weights: what it holds for lanes comes and goes with the
call, so that a whole step can be compiled. Rounding points are those of the torch operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from moescope.engine.decoder import MLP, Attention, MoE, Pass
from moescope.engine.mlx_operators.attention import MLXAttention
from moescope.engine.mlx_operators.common import DTYPES, Call, Held, Stateless, Static, Weights
from moescope.engine.mlx_operators.experts import MLXExperts
from moescope.engine.mlx_operators.matrix import Above, Dense, Matrix, Packed, Stored, array, matrix
from moescope.engine.mlx_operators.mlp import MLXMLP
from moescope.engine.mlx_operators.moe import MLXMoE, MLXRouter
from moescope.engine.mlx_operators.norms import load_norm
from moescope.engine.mlx_operators.rope import rotary_table, switches

__all__ = [
    "DTYPES",
    "MLXMLP",
    "OPERATORS",
    "Above",
    "Call",
    "Dense",
    "Held",
    "MLXAttention",
    "MLXExperts",
    "MLXMoE",
    "MLXOperator",
    "MLXRouter",
    "Matrix",
    "Packed",
    "Static",
    "Stored",
    "Weights",
    "array",
    "load_norm",
    "matrix",
    "rotary_table",
    "switches",
]


class MLXOperator(Protocol):
    """A running operator of one layer."""

    def __call__(self, h: mx.array, call: Call) -> mx.array: ...
    def state(self, lanes: int, capacity: int) -> Sequence[Held]: ...


class MLXPass(Stateless):
    """The identity."""

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        return h


Build = Callable[[Any, Weights, str, str, int], MLXOperator]
# operator -> (spec, weights, path, dtype, number of the router) -> running operator
OPERATORS: dict[type, Build] = {
    Attention: lambda spec, weights, path, dtype, _: MLXAttention(spec, weights, path, dtype),
    MLP: lambda spec, weights, path, dtype, _: MLXMLP(spec, weights, f"{path}."),
    MoE: lambda spec, weights, path, dtype, router: MLXMoE(spec, weights, path, router),
    Pass: lambda spec, weights, path, dtype, _: MLXPass(),
}
