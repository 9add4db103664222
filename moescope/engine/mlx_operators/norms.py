"""Normalisation over the last dimension. Statistics are float32 whatever the dtype."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from moescope.engine.mlx_operators.activations import silu
from moescope.engine.mlx_operators.common import Weights
from moescope.engine.mlx_operators.matrix import Matrix, array, matrix
from moescope.engine.operators import Norm

Normalise = Callable[[mx.array], mx.array]


def make_norm(
    norm: Norm, weight: mx.array | None = None, bias: mx.array | None = None
) -> Normalise:
    """[.., width] -> [.., width]. transformers rounds before it multiplies (`applies` model), but
    for the families that multiply in float32 and round once."""
    return _KINDS[norm.kind](norm, weight, bias)


def load_norm(norm: Norm | None, weights: Weights, path: str) -> Normalise | None:
    """The norm whose tensors are `<path>.weight` and `<path>.bias`; None for None."""
    if norm is None:
        return None
    weight = array(weights[f"{path}.weight"]) if norm.weight else None
    plain = make_norm(norm, weight, array(weights[f"{path}.bias"]) if norm.bias else None)
    if not norm.gate_rank:
        return plain
    return _gated(plain, *(matrix(weights[f"{path}.gate_{name}.weight"]) for name in "ab"))


def with_unit_columns(weight: mx.array) -> mx.array:
    """A matrix whose columns are divided by their lengths (Ling's head)."""
    wide = weight.astype(mx.float32)
    return (wide / (mx.linalg.norm(wide, axis=0, keepdims=True) + 1e-7)).astype(weight.dtype)


def _gated(norm: Normalise, down: Matrix, up: Matrix) -> Normalise:
    """What is normed, times a sigmoid of a narrow layer over it (A.X-K2)."""

    def run(x: mx.array) -> mx.array:
        y = norm(x)
        gate = up(silu(down(y)))
        return (y * mx.sigmoid(gate.astype(mx.float32))).astype(y.dtype)

    return run


def _rms(norm: Norm, weight: mx.array | None, bias: mx.array | None) -> Normalise:
    eps = norm.eps
    rounds_once = norm.applies == "float32" or (weight is not None and weight.dtype == mx.float32)
    if weight is None or rounds_once:
        return lambda x: mx.fast.rms_norm(x, weight, eps)
    return lambda x: weight * mx.fast.rms_norm(x, None, eps)


def _rms_zero_centred(norm: Norm, weight: mx.array | None, bias: mx.array | None) -> Normalise:
    """Weights stored less 1 (Gemma, Qwen3-Next)."""
    assert weight is not None
    eps, gain = norm.eps, 1.0 + weight.astype(mx.float32)
    if norm.applies == "float32":
        return lambda x: mx.fast.rms_norm(x.astype(mx.float32), gain, eps).astype(x.dtype)
    rounded = gain.astype(weight.dtype)
    return lambda x: rounded * mx.fast.rms_norm(x, None, eps)


def _layer(norm: Norm, weight: mx.array | None, bias: mx.array | None) -> Normalise:
    eps = norm.eps
    return lambda x: mx.fast.layer_norm(x, weight, bias, eps)


def _l2(norm: Norm, weight: mx.array | None, bias: mx.array | None) -> Normalise:
    """x / sqrt(mean(x²) + eps): Llama 4's norm of queries and keys, which has no weight."""
    return lambda x: mx.fast.rms_norm(x, None, norm.eps)


_KINDS: dict[str, Callable[[Norm, mx.array | None, mx.array | None], Normalise]] = {
    "rms": _rms,
    "rms_zero_centred": _rms_zero_centred,
    "layer": _layer,
    "l2": _l2,
}
