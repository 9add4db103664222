"""Normalisation over the last dimension. Statistics are float32 whatever the dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import Norm
from moescope.engine.torch_operators.common import Weights, linear

Normalise = Callable[[Tensor], Tensor]


def make_norm(norm: Norm, weight: Tensor | None = None, bias: Tensor | None = None) -> Normalise:
    """[.., width] -> [.., width]. transformers rounds before it multiplies (`applies` model), but
    for the families that multiply in float32 and round once."""
    return _KINDS[norm.kind](norm, weight, bias)


def load_norm(norm: Norm | None, weights: Weights, path: str) -> Normalise | None:
    """The norm whose tensors are `<path>.weight` and `<path>.bias`; None for None."""
    if norm is None:
        return None
    weight = weights[f"{path}.weight"] if norm.weight else None
    plain = make_norm(norm, weight, weights[f"{path}.bias"] if norm.bias else None)
    if not norm.gate_rank:
        return plain
    return _gated(plain, *(weights[f"{path}.gate_{name}.weight"] for name in "ab"))


def with_unit_columns(weight: Tensor) -> Tensor:
    """A matrix whose columns are divided by their lengths (Ling's head)."""
    wide = weight.float()
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=0, keepdim=True)
    return wide.div(lengths + 1e-7).to(weight.dtype)


def _gated(norm: Normalise, down: Tensor, up: Tensor) -> Normalise:
    """What is normed, times a sigmoid of a narrow layer over it (A.X-K2)."""

    def run(x: Tensor) -> Tensor:
        y = norm(x)
        gate = linear(F.silu(linear(y, down)), up)
        return (y * torch.sigmoid(gate.float())).to(y.dtype)

    return run


def _rms(norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Normalise:
    shape, eps = (norm.width,), norm.eps
    if weight is None:
        return lambda x: F.rms_norm(x, shape, None, eps)
    if norm.applies == "float32":
        return lambda x: F.rms_norm(x, shape, weight, eps)
    return lambda x: weight * F.rms_norm(x, shape, None, eps)


def _rms_zero_centred(norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Normalise:
    """Weights stored less 1 (Gemma, Qwen3-Next)."""
    assert weight is not None
    shape, eps, gain = (norm.width,), norm.eps, 1.0 + weight.float()
    if norm.applies == "float32":
        return lambda x: F.rms_norm(x.float(), shape, gain, eps).to(x.dtype)
    rounded = gain.to(weight.dtype)
    return lambda x: rounded * F.rms_norm(x, shape, None, eps)


def _layer(norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Normalise:
    shape, eps = (norm.width,), norm.eps
    if norm.applies == "float32" and weight is not None:
        gain, shift = weight.float(), None if bias is None else bias.float()
        return lambda x: F.layer_norm(x.float(), shape, gain, shift, eps).to(x.dtype)
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


def _l2(norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Normalise:
    """x / sqrt(mean(x²) + eps): Llama 4's norm of queries and keys, which has no weight."""
    eps = norm.eps

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    return run


_KINDS: dict[str, Callable[[Norm, Tensor | None, Tensor | None], Normalise]] = {
    "rms": _rms,
    "rms_zero_centred": _rms_zero_centred,
    "layer": _layer,
    "l2": _l2,
}
