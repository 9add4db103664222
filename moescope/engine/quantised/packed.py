"""What a packed tensor is: which format, which published tensors, and the numbers it stands for.

Data only. `formats` says how each format becomes numbers, `settings` what a config says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moescope.engine.header import TensorInfo

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix, or a stack of them, that several published tensors stand for.

    `tensors` are (role, published name); `shape` is that of the numbers, [..., rows, columns];
    `group_size` is how many columns share a scale, 0 where a whole row (or tensor) does, and
    `block_rows` how many rows do, 0 where all. `variant` tells readings of one format apart.
    """

    format: str
    tensors: tuple[tuple[str, str], ...]
    shape: Shape
    bits: int
    group_size: int
    block_rows: int = 1
    variant: str = ""

    def name_of(self, role: str) -> str:
        """The published tensor in this role; KeyError where the format has none."""
        return dict(self.tensors)[role]

    def sharing(self) -> str:
        """What shares a scale: `g64`, `128×128`, `per row`, `per tensor`."""
        if self.group_size and self.block_rows != 1:
            return f"{self.block_rows}×{self.group_size}"
        if self.group_size:
            return f"g{self.group_size}"
        return "per row" if self.block_rows == 1 else "per tensor"


@dataclass(frozen=True, slots=True)
class Group:
    """The published tensors that make one packed one, by role."""

    format: str
    name: str  # what they stand for, as an unpacked checkpoint calls it
    tensors: Mapping[str, TensorInfo]

    def packed(self, shape: Shape, bits: int, group_size: int, **more: object) -> Packed:
        names = tuple((role, info.name) for role, info in self.tensors.items())
        return Packed(self.format, names, shape, bits, group_size, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Held:
    """What a checkpoint holds under a name: a tensor as it is, or a packed one, in one of several
    `readings` where the config does not say which (their shapes differ)."""

    shape: Shape
    shard: str
    dtype: str
    readings: tuple[Packed, ...] = ()

    def reading(self, shape: Shape) -> Packed | None:
        """The reading that has this shape."""
        return next((packed for packed in self.readings if packed.shape == shape), None)

    def fits(self, shape: Shape) -> bool:
        return self.reading(shape) is not None if self.readings else self.shape == shape
