"""A gated short convolution (LFM2)."""

from __future__ import annotations

import torch
from torch import Tensor

from moescope.engine.operators import ShortConv
from moescope.engine.torch_operators.common import Call, Weights, linear
from moescope.engine.torch_operators.recurrent import Recurrent


class TorchShortConv(Recurrent):
    """out(C * conv(B * x)), where B, C and x are thirds of one projection."""

    def __init__(self, spec: ShortConv, weights: Weights, path: str, dtype: torch.dtype) -> None:
        super().__init__(spec.hidden, spec.kernel, (0,), dtype)
        names = ("in_proj", "conv", "out_proj")
        self.inner, self.conv, self.out = (weights[f"{path}.{name}.weight"] for name in names)
        self.biases = tuple(weights.get(f"{path}.{name}.bias") for name in names)

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        b, c, x = linear(h, self.inner, self.biases[0]).chunk(3, -1)
        gated = b * x
        mixed = torch.cat(
            [
                self.convolve(lane, gated[rows], self.conv, self.biases[1])
                for lane, _, rows in call.spans()
            ]
        )
        return linear(c * mixed, self.out, self.biases[2])
