"""Bytes of a checkpoint as numbers: torch tensors without a second copy, and a count of NaN.

Dtypes are called what safetensors calls them. Reading is the caller's: `pieces()` yields the bytes
in order, and `pieces(buffer)` reads them into a buffer it is given.
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
Pieces = Callable[..., Iterator[memoryview]]


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
    pieces: Pieces,
    dtype: torch.dtype | str | None,
    device: str,
    out: torch.Tensor | None,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    """Make a tensor of `shape` from the pieces, or fill `out`."""
    import torch

    source: torch.dtype = getattr(torch, TORCH_NAMES[stored])
    if out is None:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or source
        out = torch.empty(shape, dtype=wanted, device=device)
    assert tuple(out.shape) == shape, f"out is {tuple(out.shape)}, the tensor {shape}"
    if math.prod(shape) == 0:
        return out
    # A byte of BOOL may hold anything; only the comparison below makes it true or false.
    direct = out.device.type == "cpu" and out.dtype == source and source is not torch.bool
    if direct and out.is_contiguous():
        whole = out.reshape(-1).view(torch.uint8).numpy().data
        for piece in pieces(whole):
            if progress is not None:
                progress(len(piece))
        return out
    flat = out.view(-1) if out.is_contiguous() else torch.empty(shape, dtype=out.dtype).view(-1)
    start = 0
    for piece in pieces():
        values = torch.frombuffer(piece, dtype=torch.uint8 if source is torch.bool else source)
        values = values.ne(0) if source is torch.bool else values
        flat[start : start + len(values)] = values.to(device=flat.device)
        start += len(values)
        if progress is not None:
            progress(len(piece))
    if flat.data_ptr() != out.data_ptr():
        out.copy_(flat.view(shape))
    return out
