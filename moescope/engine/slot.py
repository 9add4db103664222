"""One tensor of a decoder, as the interpreters want it, and the usual ways to say which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from moescope.engine.operators import Norm

Shape = tuple[int, ...]
HEADS = "num_attention_heads × head_dim"


@dataclass(frozen=True, slots=True)
class Slot:
    """`says` names each dimension in the words of a config, for messages about a misfit. Where
    `per_expert`, the first dimension counts experts and the parts are `gate`, `up`, `down` of each
    (`gate_bias`, `up_bias`, `down_bias` of the experts' biases). `dtype` is what it is held in.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, int], ...]  # (name, rows), in order
    says: tuple[str, ...]
    per_expert: bool = False
    dtype: Literal["model", "float32"] = "model"

    @property
    def elements(self) -> int:
        return prod(self.shape)


def plain(name: str, shape: Shape, *says: str) -> Slot:
    """Of one part, in the model's dtype."""
    return Slot(name, shape, ((name, shape[0]),), says)


def float32(name: str, size: int, says: str) -> Slot:
    """A vector that is held in float32 whatever the model's dtype."""
    return Slot(name, (size,), ((name, size),), (says,), dtype="float32")


def of_linear(name: str, rows: int, columns: int, bias: bool, says: str) -> Iterator[Slot]:
    """A product of the hidden state, with a bias where there is one."""
    yield plain(f"{name}.weight", (rows, columns), says, "hidden_size")
    if bias:
        yield plain(f"{name}.bias", (rows,), says)


def of_norm(path: str, norm: Norm | None, says: str = "hidden_size") -> Iterator[Slot]:
    """Of a norm below `path`; nothing for None."""
    if norm is not None and norm.weight:
        yield plain(f"{path}.weight", (norm.width,), says)
    if norm is not None and norm.bias:
        yield plain(f"{path}.bias", (norm.width,), says)
    if norm is not None and norm.gate_rank:
        yield plain(f"{path}.gate_a.weight", (norm.gate_rank, norm.width), "gated_norm_rank", says)
        yield plain(f"{path}.gate_b.weight", (norm.width, norm.gate_rank), says, "gated_norm_rank")


def norm_weight(name: str, norm: Norm) -> Slot:
    """Of a norm over the heads of a mixer, which always has one."""
    return plain(f"{name}.weight", (norm.width,), HEADS)
