"""A plan of loading: which published tensors fill which rows of which of ours. Data only.

`places` makes it, before anything is read; `torch_weights` and `mlx_weights` carry it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from moescope.engine.families.forms import PLAIN, stored_shape
from moescope.engine.quantised.packed import Packed
from moescope.safety import single_line

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One published tensor, and the rows of the target it fills.

    `shape` is what it is here. Those rows are of one `expert`'s matrix; or, with `blocks`, of all
    experts' (heads'): `shape` then starts with their number, and `start` and `stop` count rows
    within each. `form` (of `forms.FORMS`, with its `sizes`) is how what is stored becomes that.
    """

    source: str
    shape: Shape
    expert: int | None
    start: int
    stop: int
    blocks: int = 0
    form: str = PLAIN
    sizes: tuple[int, ...] = ()
    packed: Packed | None = None

    @property
    def stored_shape(self) -> Shape:
        return stored_shape(self.form, self.shape, self.blocks)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def published(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that are read for it."""
        if self.packed is None:
            return (self.source,)
        return tuple(name for _, name in self.packed.tensors)


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor of ours and the published pieces it is filled from; or a `constant`, of none."""

    target: str
    shape: Shape
    pieces: tuple[Piece, ...]
    constant: float | None = None
    dtype: Literal["model", "float32"] = "model"


@dataclass(frozen=True, slots=True)
class Plan:
    placements: tuple[Placement, ...]
    layouts: tuple[str, ...]  # titles of the expert layouts met
    unused: tuple[str, ...]  # published tensors that nothing reads
    unexpected: tuple[str, ...] = ()  # those of them that have no known reason

    def notes(self) -> list[str]:
        """What a user should know of tensors that nothing reads: a bias left out is a wrong number.
        A second copy of a tied head, and frequencies that are computed anyway, are harmless."""
        notes = []
        if filled := [p for p in self.placements if p.constant is not None]:
            more = f" and {len(filled) - 1} more" if len(filled) > 1 else ""
            first = filled[0]
            notes.append(
                f"{first.target}{more}: not in the checkpoint; {first.constant:g} throughout"
            )
        if found := self.unexpected:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            name = single_line(found[0], 200)
            notes.append(f"{name}{more}: not read, config.json asks for no such tensor")
        return notes
