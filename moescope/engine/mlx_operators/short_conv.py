"""A gated short convolution (LFM2)."""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.mlx_operators.common import Call, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.recurrent import Recurrent
from moescope.engine.operators import ShortConv


class MLXShortConv(Recurrent):
    """out(C * conv(B * x)), where B, C and x are thirds of one projection."""

    def __init__(self, spec: ShortConv, weights: Weights, path: str, dtype: str) -> None:
        super().__init__(spec.hidden, spec.kernel, (), dtype)
        self.inner, self.out = (
            matrix(weights[f"{path}.{name}.weight"]) for name in ("in_proj", "out_proj")
        )
        self.conv = array(weights[f"{path}.conv.weight"])
        names = ("in_proj", "conv", "out_proj")
        self.biases = [array(weights[f"{path}.{n}.bias"]) if spec.bias else None for n in names]

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        b, c, x = mx.split(self.inner(h, self.biases[0]), 3, -1)
        mixed = self.convolve(b * x, self.conv, self.biases[1], call)
        return self.out(c * mixed, self.biases[2])
