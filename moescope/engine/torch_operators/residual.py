"""What becomes of the residual: how it starts, and how a branch is added to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.torch_operators.common import Weights

# (what a branch gives, what its tap holds, if anything) -> what the tap holds then
Adds = Callable[[Tensor, Tensor | None], Tensor]


def load_embedding(spec: DecoderSpec, weights: Weights) -> Callable[[Tensor], Tensor]:
    """Embeddings [R, H] -> the residual before the first layer, in its dtype."""
    wide = spec.residual_dtype == "float32"
    if not spec.learned_embedding:
        return lambda x: x.float() if wide else x
    shift, gain = weights["embed.shift"], weights["embed.gain"]

    def run(x: Tensor) -> Tensor:
        x = (x + shift) * gain
        return x.float() if wide else x

    return run


def load_adds(branch: Branch, weights: Weights, path: str) -> Adds:
    """The sum at the end of a branch. A float32 residual stays so: what is added is as the branch
    gives it."""
    gives = _scaled(branch, branch.multiplier, weights, f"{path}.sum.")
    keeps = _scaled(branch, branch.keeps, weights, f"{path}.sum.kept_")
    return lambda y, held: gives(y) if held is None else gives(y) + keeps(held)


def _scaled(
    branch: Branch, factor: float, weights: Weights, prefix: str
) -> Callable[[Tensor], Tensor]:
    """One of the two that are added, before it is."""

    def fixed(x: Tensor) -> Tensor:
        return x if factor == 1.0 else x * factor

    if not branch.learned_sum:
        return fixed
    shift, gain = weights[f"{prefix}shift"], weights[f"{prefix}gain"]
    return lambda x: (fixed(x) + shift) * gain
