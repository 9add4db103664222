"""The operators of `DecoderSpec` on MLX arrays: one small class each, built once per layer.

An operator is called with the hidden state after its branch's norm [R, H] and the `Call`, and gives
[R, H]. It keeps no arrays of its own but weights: what it holds for lanes comes and goes with the
call, so that a whole step can be compiled. Rounding points are those of the torch operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from moescope.engine.mlx_operators.attention import MLXAttention
from moescope.engine.mlx_operators.common import DTYPES, Call, Held, Stateless, Static, Weights
from moescope.engine.mlx_operators.convolved_attention import MLXConvolvedAttention
from moescope.engine.mlx_operators.experts import MLXExperts
from moescope.engine.mlx_operators.linear_attention import GatedDelta, KimiDelta
from moescope.engine.mlx_operators.matrix import Above, Dense, Matrix, Packed, Stored, array, matrix
from moescope.engine.mlx_operators.mla import MLXMLA
from moescope.engine.mlx_operators.mlp import MLXMLP
from moescope.engine.mlx_operators.moe import MLXMoE, MLXRouter
from moescope.engine.mlx_operators.norms import load_norm, with_unit_columns
from moescope.engine.mlx_operators.residual import Adds, load_adds, load_embedding
from moescope.engine.mlx_operators.rope import rotary_table, switches
from moescope.engine.mlx_operators.routed_attention import MLXRoutedAttention
from moescope.engine.mlx_operators.short_conv import MLXShortConv
from moescope.engine.mlx_operators.state_space import Mamba1, Mamba2
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    LinearAttention,
    MoE,
    Pass,
    RoutedAttention,
    ShortConv,
    StateSpace,
)

__all__ = [
    "DTYPES",
    "MLXMLP",
    "OPERATORS",
    "Above",
    "Adds",
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
    "load_adds",
    "load_embedding",
    "load_norm",
    "matrix",
    "rotary_table",
    "switches",
    "with_unit_columns",
]


class MLXOperator(Protocol):
    """A running operator of one layer."""

    def __call__(self, h: mx.array, call: Call) -> mx.array: ...
    def state(self, lanes: int, capacity: int) -> Sequence[Held]: ...


class MLXPass(Stateless):
    """The identity."""

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        return h


LINEAR: dict[str, Callable[[Any, Weights, str, str], MLXOperator]] = {
    "gated_delta": GatedDelta,
    "kda": KimiDelta,
}
STATE_SPACES: dict[str, Callable[[Any, Weights, str, str], MLXOperator]] = {
    "mamba1": Mamba1,
    "mamba2": Mamba2,
}
Build = Callable[[Any, Weights, str, str, int], MLXOperator]
# operator -> (spec, weights, path, dtype, number of the router) -> running operator
OPERATORS: dict[type, Build] = {
    Attention: lambda spec, weights, path, dtype, _: MLXAttention(spec, weights, path, dtype),
    ConvolvedAttention: lambda spec, weights, path, dtype, _: MLXConvolvedAttention(
        spec, weights, path, dtype
    ),
    LinearAttention: lambda spec, weights, path, dtype, _: LINEAR[spec.kind](
        spec, weights, path, dtype
    ),
    MLA: lambda spec, weights, path, dtype, _: MLXMLA(spec, weights, path, dtype),
    MLP: lambda spec, weights, path, dtype, _: MLXMLP(spec, weights, f"{path}."),
    MoE: lambda spec, weights, path, dtype, router: MLXMoE(spec, weights, path, router),
    Pass: lambda spec, weights, path, dtype, _: MLXPass(),
    RoutedAttention: lambda spec, weights, path, dtype, router: MLXRoutedAttention(
        spec, weights, path, dtype, router
    ),
    ShortConv: lambda spec, weights, path, dtype, _: MLXShortConv(spec, weights, path, dtype),
    StateSpace: lambda spec, weights, path, dtype, _: STATE_SPACES[spec.kind](
        spec, weights, path, dtype
    ),
}
