"""The operators of `DecoderSpec` on torch tensors: one small class each, built once per layer.

An operator is called with the hidden state after its branch's norm [R, H] and the `Call`, and gives
[R, H]. It keeps its own state for every lane: `open` allocates, `copy` forks. Rounding points are
those of transformers' eager code, so that bfloat16 runs agree closely. Lanes, taps and records are
`torch_decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

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
from moescope.engine.torch_operators.attention import TorchAttention
from moescope.engine.torch_operators.common import (
    DTYPES,
    Call,
    Groups,
    Stateless,
    Weights,
    linear,
)
from moescope.engine.torch_operators.convolved_attention import TorchConvolvedAttention
from moescope.engine.torch_operators.experts import TorchExperts, grouped_products
from moescope.engine.torch_operators.linear_attention import GatedDelta, KimiDelta
from moescope.engine.torch_operators.mla import TorchMLA
from moescope.engine.torch_operators.mlp import ACTIVATIONS, TorchMLP
from moescope.engine.torch_operators.moe import TorchMoE, TorchRouter, rounded_gate
from moescope.engine.torch_operators.norms import load_norm, make_norm, with_unit_columns
from moescope.engine.torch_operators.recurrent import Recurrent, Saved
from moescope.engine.torch_operators.residual import Adds, load_adds, load_embedding
from moescope.engine.torch_operators.rope import rotary_table, switches
from moescope.engine.torch_operators.routed_attention import TorchRoutedAttention
from moescope.engine.torch_operators.short_conv import TorchShortConv
from moescope.engine.torch_operators.state_space import Mamba1, Mamba2

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "OPERATORS",
    "Adds",
    "Call",
    "Groups",
    "Recurrent",
    "Saved",
    "TorchAttention",
    "TorchExperts",
    "TorchMLA",
    "TorchMLP",
    "TorchMoE",
    "TorchOperator",
    "TorchRouter",
    "Weights",
    "grouped_products",
    "linear",
    "load_adds",
    "load_embedding",
    "load_norm",
    "make_norm",
    "rotary_table",
    "rounded_gate",
    "switches",
    "with_unit_columns",
]


class TorchOperator(Protocol):
    """A running operator of one layer."""

    def __call__(self, h: Tensor, call: Call) -> Tensor: ...
    def open(self, lanes: int, capacity: int, device: str) -> None: ...
    def copy(self, source: int, target: int, length: int) -> None: ...


class TorchPass(Stateless):
    """The identity."""

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        return h


_DELTAS: dict[str, Callable[[Any, Weights, str, torch.dtype], TorchOperator]] = {
    "gated_delta": GatedDelta,
    "kda": KimiDelta,
}
_MAMBAS: dict[str, Callable[[Any, Weights, str, torch.dtype], TorchOperator]] = {
    "mamba1": Mamba1,
    "mamba2": Mamba2,
}
Build = Callable[[Any, Weights, str, torch.dtype, int], TorchOperator]
# operator -> (spec, weights, path, dtype, number of the router) -> running operator
OPERATORS: dict[type, Build] = {
    Attention: lambda spec, weights, path, dtype, _: TorchAttention(spec, weights, path, dtype),
    ConvolvedAttention: lambda spec, weights, path, dtype, _: TorchConvolvedAttention(
        spec, weights, path, dtype
    ),
    MLA: lambda spec, weights, path, dtype, _: TorchMLA(spec, weights, path, dtype),
    MLP: lambda spec, weights, path, dtype, _: TorchMLP(spec, weights, f"{path}."),
    MoE: lambda spec, weights, path, dtype, router: TorchMoE(spec, weights, path, router),
    Pass: lambda spec, weights, path, dtype, _: TorchPass(),
    RoutedAttention: lambda spec, weights, path, dtype, router: TorchRoutedAttention(
        spec, weights, path, dtype, router
    ),
    ShortConv: lambda spec, weights, path, dtype, _: TorchShortConv(spec, weights, path, dtype),
    LinearAttention: lambda spec, weights, path, dtype, _: _DELTAS[spec.kind](
        spec, weights, path, dtype
    ),
    StateSpace: lambda spec, weights, path, dtype, _: _MAMBAS[spec.kind](
        spec, weights, path, dtype
    ),
}
