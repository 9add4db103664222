"""The header of a safetensors file, checked by our own rules before any library sees the file.

The format (README of huggingface/safetensors): 8 bytes of length, that much JSON, then the bytes of
the tensors, without gap or overlap, to the end. Readers differ in what else they let pass (names
twice, dimensions beyond 32 bits, trailing bytes); what is accepted here every reader reads alike.
Pure functions over bytes; opening and reading is `files.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moescope.engine.config import bad, parse_object, shown
from moescope.engine.files import pread, refused
from moescope.errors import MoescopeError
from moescope.safety import LIMITS, single_line

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (pickle)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"GGUF", "GGUF"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x89HDF", "HDF5"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<", "a web page"),
)
_REFUSED = frozenset({"a zip archive, as torch.save writes (pickle)", "a pickle"})
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one shard."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    text: bytes  # as it stands in the file, for the hash


def read_header(descriptor: int, size: int, shard: str) -> Header:
    """Read and check the header of an open file of `size` bytes."""
    start = pread(descriptor, min(size, 32), 0, shard)
    length = header_length(start, size, shard)
    return check_header(pread(descriptor, length, 8, shard), size, shard)


def header_length(start: bytes, size: int, shard: str) -> int:
    """The length the first 8 bytes state, where it can be true of a file of `size` bytes."""
    if start[8:9] != b"{":  # only then: a length may look like magic
        for magic, what in _MAGIC:
            if start.startswith(magic) or start[8:].startswith(magic):
                raise _foreign(shard, what)
    if size < 8 + 2:
        raise bad(f"{shard}: expected at least 10 bytes, found {size}", _AGAIN)
    length = int.from_bytes(start[:8], "little")
    most = min(size - 8, LIMITS.header_bytes)
    if not 2 <= length <= most:
        raise bad(
            f"{shard}: header length: expected 2..{most}, found {length} in a file of {size} bytes",
            _AGAIN,
        )
    if start[8:9] != b"{":
        raise bad(f"{shard}: header: expected to start with {{, found byte 0x{start[8]:02x}")
    return length


def _foreign(shard: str, what: str) -> MoescopeError:
    message = f"{shard}: expected safetensors, found {what}"
    if what in _REFUSED:
        hint = "use the safetensors release of this model; pickles can run code"
        return refused(f"{message}; moescope does not open those", hint)
    return bad(message, _AGAIN if what in ("a Git LFS pointer", "a web page") else "")


def check_header(text: bytes, size: int, shard: str) -> Header:
    """Check the JSON of a header against every rule, for a file of `size` bytes."""
    entries = parse_object(text, f"{shard}: header")
    metadata = _metadata(entries.pop("__metadata__", {}), shard)
    if len(entries) > LIMITS.tensors_per_shard:
        raise bad(
            f"{shard}: expected at most {LIMITS.tensors_per_shard} tensors, found {len(entries)}"
        )
    data = 8 + len(text)
    tensors = {name: _tensor(name, entry, data, shard) for name, entry in entries.items()}
    _check_layout(tensors.values(), data, size, shard)
    return Header(tensors, metadata, text)


def _metadata(value: Any, shard: str) -> dict[str, str]:
    if value is None:  # what MLX writes where there is none, and the library reads
        return {}
    if type(value) is not dict or not all(type(item) is str for item in value.values()):
        raise bad(f"{shard}: __metadata__: expected an object of strings, found {shown(value)}")
    return value


def _is_dimension(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LIMITS.dimension


def _tensor(name: str, entry: Any, data: int, shard: str) -> TensorInfo:
    """One entry, checked by itself."""
    if not (0 < len(name) <= LIMITS.tensor_name and name.isascii() and name.isprintable()):
        raise bad(
            f'{shard}: tensor name "{single_line(name, 80)}": '
            f"expected 1..{LIMITS.tensor_name} printable ASCII characters"
        )
    if type(entry) is not dict or entry.keys() != _FIELDS:
        found = ", ".join(sorted(entry)) if type(entry) is dict else shown(entry)
        raise bad(
            f"{shard}: {name}: expected dtype, shape and data_offsets, "
            f"found {single_line(found, 80) or 'nothing'}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        raise bad(
            f"{shard}: {name}.dtype: expected one of {', '.join(ITEM_BYTES)}, found {shown(dtype)}"
        )
    if type(shape) is not list or len(shape) > LIMITS.rank or not all(map(_is_dimension, shape)):
        raise bad(
            f"{shard}: {name}.shape: expected up to {LIMITS.rank} integers in "
            f"0..{LIMITS.dimension}, found {shown(shape)}"
        )
    # The strides of an empty tensor are products of its other dimensions, in 64 bits.
    if math.prod(dimension or 1 for dimension in shape) * ITEM_BYTES[dtype] >= 2**62:
        raise bad(f"{shard}: {name}.shape: expected less than 2^62 bytes, found {shown(shape)}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if type(offsets) is not list or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise bad(f"{shard}: {name}.data_offsets: expected two integers, found {shown(offsets)}")
    begin, end = offsets
    if begin < 0 or end - begin != nbytes:
        raise bad(
            f"{shard}: {name}.data_offsets: expected {nbytes} bytes "
            f"({dtype} {shown(shape)}), found {shown(offsets)}"
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, shard, data + begin)


def _check_layout(tensors: Any, data: int, size: int, shard: str) -> None:
    """Tensors follow each other from the first byte of data to the last of the file."""
    expected = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != expected:
            what = "overlap" if tensor.offset < expected else "gap"
            raise bad(
                f"{shard}: {tensor.name}.data_offsets: expected begin {expected - data}, "
                f"found {tensor.offset - data} ({what})"
            )
        expected += tensor.nbytes
    if expected > size:
        raise bad(
            f"{shard}: file size: expected {expected} bytes, found {size}; it is cut short", _AGAIN
        )
    if expected < size:
        raise bad(
            f"{shard}: file size: expected {expected} bytes, found {size}; bytes after the tensors"
        )
