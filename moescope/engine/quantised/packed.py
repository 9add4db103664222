"""What a packed tensor is: which format, which published tensors, and the numbers it stands for.

Data only. `quantised.formats` says how each format becomes numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix, or a stack of them, that several published tensors stand for.

    `tensors` are (role, published name); `shape` is that of the numbers, [..., rows, columns];
    `group_size` is how many columns share a scale, 0 where a whole row or the whole tensor does.
    """

    format: str
    tensors: tuple[tuple[str, str], ...]
    shape: Shape
    bits: int
    group_size: int

    def name_of(self, role: str) -> str:
        """The published tensor in this role; KeyError where the format has none."""
        return dict(self.tensors)[role]

    def words(self) -> str:
        """`mlx affine, 8 bit, groups of 64`."""
        groups = f", groups of {self.group_size}" if self.group_size else ""
        return f"{self.format}, {self.bits} bit{groups}"
