"""What the operators of a fused step have in common: their inputs and scratch memory, and what
stands before and behind them in a branch.

A norm before an operator rides in its first product, multiplier and sum in its last; what no kernel
takes along is done by torch, inside the graph too. Letters: N lanes, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moescope.engine.decoder import Branch
from moescope.engine.graph_slots import Buffers
from moescope.engine.graph_static import Static
from moescope.engine.operators import Norm
from moescope.engine.torch_operators import Adds, load_norm
from moescope.kernels.triton_ops import attention, gate_router, norms, sampling

Weights = Mapping[str, Tensor]
Normalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory of kernels for N lanes. Made before a capture and kept: its counters start at 0."""

    attention: attention.Scratch | None
    sampling: sampling.Scratch
    gates: list[gate_router.Scratch]  # of each router


@dataclass(frozen=True, slots=True)
class Running:
    """What the operators of one step share: inputs, where routing goes, and scratch memory."""

    buffers: Buffers
    slot: Mapping[str, Tensor]
    scratch: Scratch
    static: Static  # what operators without a fused form are given
    pdl: bool


@dataclass(frozen=True, slots=True)
class RmsWeight:
    """A norm that kernels do: RMS statistics, and a weight."""

    weight: Tensor
    eps: float
    applies: str

    def riding(self) -> dict[str, Any]:
        """Arguments of a product that norms its input."""
        return {"norm": self.weight, "eps": self.eps, "applies": self.applies}


def rms_weight(norm: Norm, weights: Weights, path: str, dtype: torch.dtype) -> RmsWeight | None:
    """A norm as kernels know it, where it is one: of weights stored less 1, or of none, those that
    it comes to."""
    if norm.kind == "layer" or norm.bias or norm.gate_rank:
        return None
    if not norm.weight:
        device = next(iter(weights.values())).device
        return RmsWeight(torch.ones(norm.width, dtype=dtype, device=device), norm.eps, "float32")
    weight = weights[f"{path}.weight"]
    if norm.kind == "rms_zero_centred":
        gain = 1.0 + weight.float()
        weight = gain if norm.applies == "float32" else gain.to(weight.dtype)
    return RmsWeight(weight, norm.eps, norm.applies)


@dataclass(frozen=True, slots=True)
class Before:
    """The norm before an operator, if there is one: `rms` for kernels, `whole` in torch."""

    rms: RmsWeight | None = None
    whole: Normalise | None = None

    @classmethod
    def load(cls, norm: Norm | None, weights: Weights, path: str, dtype: torch.dtype) -> Before:
        if norm is None:
            return cls()
        return cls(rms_weight(norm, weights, path, dtype), load_norm(norm, weights, path))

    def opened(self, read: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What a first product is given, and the arguments that let it norm that."""
        if self.rms is not None:
            return read, self.rms.riding()
        return self.applied(read), {}

    def applied(self, read: Tensor) -> Tensor:
        """What an operator reads."""
        return read if self.whole is None else self.whole(read)


@dataclass(frozen=True, slots=True)
class After:
    """What happens to an operator's output: norm, multiplier, sum with what the tap holds. `adds`
    is that sum where no kernel does it: with learned vectors, or into a float32 residual."""

    norm: Before
    multiplier: float
    adds: Adds | None = None

    def riding(self, held: Tensor | None) -> dict[str, Any]:
        """Arguments of a last product that does what it can of this."""
        if not self._rides:
            return {}
        return {"multiplier": self.multiplier, "residual": held, "out": held}

    def rest(self, y: Tensor, held: Tensor | None) -> Tensor:
        """What then remains."""
        return y if self._rides else self.every(y, held)

    @property
    def _rides(self) -> bool:
        return self.norm.whole is None and self.adds is None

    def every(self, y: Tensor, held: Tensor | None) -> Tensor:
        """All of it."""
        if self.adds is not None:
            return self.adds(self.norm.applied(y), held)
        if (rms := self.norm.rms) is not None:
            into = torch.empty_like(y) if held is None else held
            norms.rms_norm(
                *(y, rms.weight, rms.eps, rms.applies),
                multiplier=self.multiplier,
                held=held,
                out=into,
            )
            return into
        y = self.norm.applied(y)
        y = y if self.multiplier == 1.0 else y * self.multiplier
        return y if held is None else held.add_(y)


class Operator(Protocol):
    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        """The tap after the branch: `read` [N, H] is what the branch reads, `held` what the tap
        holds, which may be written over; what it gives is memory of its own, or `held`."""


Branching = tuple[Before, Operator, After, Branch]
