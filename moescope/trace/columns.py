"""One array as the bytes a trace stores: `pack` and `unpack`, and the checksum beside them.

The token axis goes last and the bytes of the numbers are split into planes, so that what changes
slowly lies together; each plane is deflated, or kept where that gains nothing (the low bytes of a
float32 mantissa). Frames and SQL are elsewhere.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMN_BYTES = 64 << 20  # of one column of one chunk, expanded: 256 frames of 60 routers × 1,024
DTYPES = {1: "|i1", 2: "|u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<i8", 8: "<f4", 9: "<f8"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
RAW, DEFLATED = 0, 1
MAX_DIMENSIONS = 4
PLANE = struct.Struct("<BI")  # kept or deflated, stored bytes
SAMPLE = 4096  # bytes tried before a long plane is deflated


class ColumnError(ValueError):
    """Bytes that are not what `pack` writes; the message says what is wrong with them."""


def checksum(name: str, first: int, count: int, blob: bytes) -> int:
    """CRC-32 over the stored bytes, seeded with the key they belong to: neither can stray."""
    return zlib.crc32(blob, zlib.crc32(f"{name}:{first}:{count}".encode()))


def pack(array: NDArray[Any]) -> bytes:
    """Encode an array of up to 4 dimensions, the first being tokens; keeps every bit."""
    data = np.asarray(array)
    code = CODES[data.dtype.newbyteorder("<")]
    head = struct.pack(f"<BB{data.ndim}I", code, data.ndim, *data.shape)
    if data.ndim > 1:
        data = np.moveaxis(data, 0, -1)
    width = data.dtype.itemsize
    flat = np.ascontiguousarray(data, dtype=DTYPES[code]).reshape(-1).view(np.uint8)
    planes = [flat.reshape(-1, width)[:, byte].tobytes() for byte in range(width)]
    return head + b"".join(_pack_plane(plane) for plane in planes)


def _pack_plane(plane: bytes) -> bytes:
    middle = max(len(plane) // 2 - SAMPLE // 2, 0)
    sample = plane[middle : middle + SAMPLE]
    if len(plane) > 4 * SAMPLE and len(zlib.compress(sample, 1)) > 0.97 * SAMPLE:
        return PLANE.pack(RAW, len(plane)) + plane
    small = zlib.compress(plane, 1)
    if len(small) >= len(plane):
        return PLANE.pack(RAW, len(plane)) + plane
    return PLANE.pack(DEFLATED, len(small)) + small


def unpack(blob: bytes, limit: int = COLUMN_BYTES) -> NDArray[Any]:
    """The array `pack` was given. Raises `ColumnError` for anything else, and never expands more
    than `limit` bytes, whatever the blob says."""
    if len(blob) < 2 or blob[0] not in DTYPES or not 1 <= blob[1] <= MAX_DIMENSIONS:
        raise ColumnError("not an encoded column")
    dtype, dimensions = np.dtype(DTYPES[blob[0]]), blob[1]
    offset = 2 + 4 * dimensions
    if len(blob) < offset:
        raise ColumnError("not an encoded column")
    shape = struct.unpack_from(f"<{dimensions}I", blob, 2)
    size = math.prod(shape)
    if size * dtype.itemsize > limit:
        raise ColumnError(f"declares {size * dtype.itemsize:,} bytes; limit {limit:,}")
    planes = np.empty((size, dtype.itemsize), dtype=np.uint8)
    for byte in range(dtype.itemsize):
        if len(blob) < offset + PLANE.size:
            raise ColumnError("ends too early")
        how, stored = PLANE.unpack_from(blob, offset)
        offset += PLANE.size
        planes[:, byte] = np.frombuffer(
            _unpack_plane(how, blob[offset : offset + stored], stored, size), dtype=np.uint8
        )
        offset += stored
    if offset != len(blob):
        raise ColumnError("has bytes after its end")
    flat = planes.reshape(-1).view(dtype)
    if dimensions == 1:
        return flat
    return np.ascontiguousarray(np.moveaxis(flat.reshape(*shape[1:], shape[0]), -1, 0))


def _unpack_plane(how: int, stored: bytes, declared: int, size: int) -> bytes:
    if len(stored) != declared or how not in (RAW, DEFLATED):
        raise ColumnError("ends too early")
    if how == RAW:
        plane = stored
    else:
        inflate = zlib.decompressobj()
        try:
            plane = inflate.decompress(stored, size + 1)
        except zlib.error as error:
            raise ColumnError("is not deflated data") from error
        if not inflate.eof or inflate.unused_data:
            raise ColumnError("is not deflated data of the declared size")
    if len(plane) != size:
        raise ColumnError(f"expands to {len(plane):,} bytes where {size:,} were declared")
    return plane
