"""The dense feed-forward block, and the activations that it and the experts share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import MLP, Experts
from moescope.engine.torch_operators.common import Stateless, Weights, linear


def _swish(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.sigmoid(x * alpha)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": _relu2,
}


def make_activation(spec: MLP | Experts) -> Callable[[Tensor], Tensor]:
    """gate_up [.., 2I] (gate first; [.., I] without a gate) -> [.., I]."""
    function = (
        _swish(spec.alpha) if spec.activation == "swiglu_oai" else ACTIVATIONS[spec.activation]
    )
    if not spec.glu:
        return function
    limit, before, shift = spec.limit, spec.limit_site == "before", spec.up_shift

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        if limit and before:
            gate = gate.clamp(max=limit)
        gate = function(gate)
        if limit:
            up = up.clamp(-limit, limit)
            gate = gate if before else gate.clamp(max=limit)
        return gate * (up + shift) if shift else gate * up

    return gated


class TorchMLP(Stateless):
    """A dense block, with or without a gate."""

    def __init__(self, spec: MLP, weights: Weights, path: str) -> None:
        self.activation = make_activation(spec)
        self.gate_up, self.gate_up_bias = (
            weights[f"{path}gate_up.weight"],
            weights.get(f"{path}gate_up.bias"),
        )
        self.down, self.down_bias = (
            weights[f"{path}down_proj.weight"],
            weights.get(f"{path}down_proj.bias"),
        )

    def __call__(self, h: Tensor, call: object = None) -> Tensor:
        inner = self.activation(linear(h, self.gate_up, self.gate_up_bias))
        return linear(inner, self.down, self.down_bias)
