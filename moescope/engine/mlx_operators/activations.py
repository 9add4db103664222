"""What stands between the products of a feed-forward block; rounded as torch's functions round."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from moescope.engine.operators import MLP, Experts

Activate = Callable[[mx.array], mx.array]


def softplus(x: mx.array) -> mx.array:
    """log(1 + exp(x)), overflowing nowhere."""
    return mx.logaddexp(x, mx.zeros((), x.dtype))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), rounded once."""
    wide = x.astype(mx.float32)
    return (wide * mx.sigmoid(wide)).astype(x.dtype)


def _gelu(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * 0.5 * (1 + mx.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_tanh(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * 0.5 * (1 + mx.tanh(inner))).astype(x.dtype)


def _relu2(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


def _swish(alpha: float) -> Activate:
    """gate * sigmoid(alpha * gate), every step rounded (gpt-oss)."""
    return lambda gate: gate * mx.sigmoid(gate * alpha)


ACTIVATIONS: dict[str, Activate] = {
    "silu": silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}


def make_activation(spec: MLP | Experts) -> Activate:
    """gate_up [.., 2I] (gate first; [.., I] without a gate) -> [.., I]."""
    function = (
        _swish(spec.alpha) if spec.activation == "swiglu_oai" else ACTIVATIONS[spec.activation]
    )
    if not spec.glu:
        return function
    limit, before, shift = spec.limit, spec.limit_site == "before", spec.up_shift

    def gated(gate_up: mx.array) -> mx.array:
        gate, up = mx.split(gate_up, 2, -1)
        if limit and before:
            gate = mx.minimum(gate, limit)
        gate = function(gate)
        if limit:
            up = mx.clip(up, -limit, limit)
            gate = gate if before else mx.minimum(gate, limit)
        return gate * (up + shift) if shift else gate * up

    return gated
