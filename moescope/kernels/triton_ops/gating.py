"""What experts and dense blocks do between their two products: an activation, the product with the
other half, and what limits both. Rounding points are those of `torch_operators.make_activation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from moescope.kernels.triton_ops.gemv import rounded

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")


@dataclass(frozen=True, slots=True)
class Gating:
    """Fields as in `engine.operators.MLP`; `limit_after`: the gate is limited after its
    activation. Without `glu` there is no second half."""

    activation: str = "silu"
    glu: bool = True
    limit: float = 0.0
    limit_after: bool = False
    alpha: float = 1.0
    up_shift: float = 0.0

    def __post_init__(self) -> None:
        assert self.activation in ACTIVATIONS

    def constants(self) -> dict[str, Any]:
        return {
            "ACTIVATION": self.activation,
            "GLU": self.glu,
            "LIMIT": self.limit,
            "LIMIT_AFTER": self.limit_after,
            "ALPHA": self.alpha,
            "UP_SHIFT": self.up_shift,
        }


@triton.jit
def activated(x, like, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """float32, rounded where torch rounds on its way to the dtype of `like`."""
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "relu2":
        x = tl.where(x < 0, 0.0, x)  # a NaN stays one
        return x * x
    if ACTIVATION == "swiglu_oai":
        steep = rounded(x * ALPHA, like)
        return x * rounded(1 / (1 + tl.exp(-steep)), like)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-2 * inner))  # x × (1 + tanh(inner)) / 2


@triton.jit
def gated(
    gate,
    up,
    like,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
):
    """Of the two halves of a product, float32 and not rounded yet."""
    gate, up = rounded(gate, like), rounded(up, like)
    if LIMIT > 0.0:
        if not LIMIT_AFTER:
            gate = rounded(tl.where(gate > LIMIT, LIMIT, gate), like)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        up = rounded(up, like)
    gate = rounded(activated(gate, like, ACTIVATION, ALPHA), like)
    if LIMIT > 0.0:  # noqa: SIM102
        if LIMIT_AFTER:
            gate = rounded(tl.where(gate > LIMIT, LIMIT, gate), like)
    if UP_SHIFT != 0.0:
        up = rounded(up + UP_SHIFT, like)
    return gate * up
