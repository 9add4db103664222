"""What becomes of the residual: how it starts, and how a branch is added to it."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.mlx_operators.common import Weights
from moescope.engine.mlx_operators.matrix import array

# (what a branch gives, what its tap holds, if anything) -> what the tap holds then
Adds = Callable[[mx.array, mx.array | None], mx.array]


def load_embedding(spec: DecoderSpec, weights: Weights) -> Callable[[mx.array], mx.array]:
    """Embeddings [R, H] -> the residual before the first layer, in its dtype."""
    wide = spec.residual_dtype == "float32"
    if not spec.learned_embedding:
        return lambda x: x.astype(mx.float32) if wide else x
    shift, gain = array(weights["embed.shift"]), array(weights["embed.gain"])

    def run(x: mx.array) -> mx.array:
        x = (x + shift) * gain
        return x.astype(mx.float32) if wide else x

    return run


def load_adds(branch: Branch, weights: Weights, path: str) -> Adds:
    """The sum at the end of a branch. A float32 residual stays so: what is added is as the branch
    gives it."""
    gives = _scaled(branch, branch.multiplier, weights, f"{path}.sum.")
    keeps = _scaled(branch, branch.keeps, weights, f"{path}.sum.kept_")
    return lambda y, held: gives(y) if held is None else keeps(held) + gives(y)


def _scaled(
    branch: Branch, factor: float, weights: Weights, prefix: str
) -> Callable[[mx.array], mx.array]:
    """One of the two that are added, before it is."""

    def fixed(x: mx.array) -> mx.array:
        return x if factor == 1.0 else x * factor

    if not branch.learned_sum:
        return fixed
    shift, gain = array(weights[f"{prefix}shift"]), array(weights[f"{prefix}gain"])
    return lambda x: (fixed(x) + shift) * gain
