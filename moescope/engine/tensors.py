"""Bytes of a checkpoint as numbers: torch tensors without a second copy, and a count of NaN.

Dtypes are called what safetensors calls them. Reading is the caller's: `fill(offset, buffer)` reads
a tensor's bytes from `offset` on into a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PIECE = 64 << 20  # bytes; a multiple of every item size

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
# As bits: the word, the mask of the exponent, and the value of the masked bits that is not finite.
_BITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00, 0x7C00),
    "BF16": (np.uint16, 0x7F80, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),  # no infinities; NaN is all ones
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
}
Fill = Callable[[int, memoryview], None]


def non_finite(dtype: str, piece: memoryview) -> int:
    """How many of these values are NaN or infinite."""
    if dtype not in _BITS:
        return 0
    word, mask, marked = _BITS[dtype]
    bits = np.frombuffer(piece, dtype=word)
    return int(np.count_nonzero((bits & word(mask)) == word(marked)))


def read_torch(
    stored: str,
    shape: tuple[int, ...],
    fill: Fill,
    dtype: torch.dtype | str | None,
    device: str,
    out: torch.Tensor | None,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    """Make a tensor of `shape` from what `fill` reads, or fill `out`."""
    import torch

    source: torch.dtype = getattr(torch, TORCH_NAMES[stored])
    if out is None:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or source
        out = torch.empty(shape, dtype=wanted, device=device)
    assert tuple(out.shape) == shape, f"out is {tuple(out.shape)}, the tensor {shape}"
    for part, begin in _whole_parts(out, 0, source.itemsize):
        for piece, start, stop in _pieces(part, source.itemsize):
            _read_piece(source, fill, begin + start, stop - start, piece)
            if progress is not None:
                progress(stop - start)
    return out


def _whole_parts(out: torch.Tensor, begin: int, item: int) -> Iterator[tuple[torch.Tensor, int]]:
    """`out` cut along its first dimensions into parts that lie in one piece, and their offsets."""
    if out.is_contiguous():
        yield out.view(-1), begin
        return
    for part in out:
        yield from _whole_parts(part, begin, item)
        begin += math.prod(part.shape) * item


def _pieces(flat: torch.Tensor, item: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """A flat tensor cut into pieces, and the bytes of each in the file: begin and end."""
    step = PIECE // item
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        yield piece, start * item, (start + len(piece)) * item


def _read_piece(source: torch.dtype, fill: Fill, begin: int, count: int, out: torch.Tensor) -> None:
    import torch

    # A byte of BOOL may hold anything; only the comparison makes it true or false.
    if out.device.type == "cpu" and out.dtype == source and source is not torch.bool:
        fill(begin, out.view(torch.uint8).numpy().data)
        return
    data = bytearray(count)
    fill(begin, memoryview(data))
    values = torch.frombuffer(data, dtype=torch.uint8 if source is torch.bool else source)
    values = values.ne(0) if source is torch.bool else values
    out.copy_(values.to(out.device))
