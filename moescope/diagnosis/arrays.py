"""Arrays of experts or counts as other programs save them, and files of token ids.

`.npy` and `.npz` (vLLM's `[tokens, layers, K]`, counts `[layers, E]`), and llama.cpp's CSV of
`layer,expert`. Headers are checked before anything is read; nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moescope.safety import LIMITS, single_line
from moescope.trace.metadata import trace_error

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
PAIRS = re.compile(rb"\s*\"?layer\"?\s*,\s*\"?expert\"?\s*\r?\n")
MOST_VALUES = 1 << 28
MOST_BYTES = 1 << 30
MOST_TOKENS = 1 << 24
IDS = ("routed_experts", "expert_ids", "counts")
START = 64


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """`values` [T, L, K] ids, or [L, E] where `counts`; `weights` and `token_ids` beside them."""

    values: NDArray[np.int64]
    counts: bool
    weights: NDArray[np.float32] | None = None
    token_ids: NDArray[np.int64] | None = None


def is_array(path: Path) -> bool:
    """Whether a file is of these forms, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError as error:
        raise trace_error(path, (error.strerror or "cannot be read").lower()) from error
    return start.startswith((NPY, ZIP)) or PAIRS.match(start) is not None


def read(path: Path) -> Held:
    """What a file of these forms holds. Raises MoescopeError (TRACE)."""
    try:
        with path.open("rb") as file:
            start = file.read(START)
            file.seek(0)
            if start.startswith(NPY):
                return _held({"": _npy(file, path.stat().st_size, path)}, path)
            if start.startswith(ZIP):
                return _held(_npz(file, path), path)
            return _pairs(file.read(MOST_BYTES + 1), path)
    except OSError as error:
        raise trace_error(path, (error.strerror or "cannot be read").lower()) from error


def read_tokens(path: str | Path | None) -> NDArray[np.int64]:
    """Token ids from a file: JSON, `.npy`, or numbers with anything between them."""
    assert path is not None
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise trace_error(path, f"larger than {MOST_BYTES:,} bytes")
        with path.open("rb") as file:
            if file.read(len(NPY)) == NPY:
                file.seek(0)
                return _tokens(_npy(file, size, path), path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise trace_error(path, (error.strerror or "cannot be read").lower()) from error
    except UnicodeDecodeError as error:
        raise trace_error(path, "expected token ids as text, JSON or .npy") from error
    if re.fullmatch(r"[\s\d,;\[\]]*", text) is None:
        raise trace_error(path, "expected whole numbers and nothing else")
    return _tokens(np.array([int(n[:18]) for n in re.findall(r"\d+", text)], np.int64), path)


def _tokens(values: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if values.ndim != 1 or values.dtype.kind not in "iu" or not 0 < len(values) <= MOST_TOKENS:
        raise trace_error(path, "expected a list of token ids")
    return values.astype(np.int64)


def _npy(file: BinaryIO, size: int, path: Path) -> NDArray[Any]:
    """One array, its header checked against what is there."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError("version")
        reader = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reader(file, max_header_size=10_000)
    except (ValueError, EOFError, OverflowError) as error:
        raise trace_error(path, "not a good .npy header") from error
    count = prod(shape)
    if dtype.hasobject or dtype.kind not in "iufb" or any(n < 0 for n in shape):
        raise trace_error(path, f"expected numbers, found {single_line(str(dtype), 40)}")
    if count > MOST_VALUES or count * dtype.itemsize > size - file.tell():
        raise trace_error(path, f"declares {count:,} values, which are not there")
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise trace_error(path, "ends too early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npz(file: BinaryIO, path: Path) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > 64 or sum(m.file_size for m in members) > MOST_BYTES:
                raise trace_error(path, f"expands beyond {MOST_BYTES:,} bytes")
            for member in members:
                with archive.open(member) as part:
                    data = part.read(member.file_size + 1)
                if len(data) != member.file_size or not data.startswith(NPY):
                    raise trace_error(path, "expected .npy arrays in it")
                name = member.filename.removesuffix(".npy")
                found[name] = _npy(io.BytesIO(data), len(data), path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        raise trace_error(path, "not a good .npz file") from error
    return found


def _held(parts: dict[str, NDArray[Any]], path: Path) -> Held:
    name = next((known for known in IDS if known in parts), None)
    if name is None and len(parts) == 1:
        name = next(iter(parts))
    if name is None:
        raise trace_error(path, f"expected an array called {', '.join(IDS)}")
    values = parts[name]
    if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or 0 in values.shape:
        shown = f"{values.dtype} {list(values.shape)}"
        raise trace_error(path, f"expected ids [tokens, layers, K] or counts [layers, E], {shown}")
    if values.ndim == 3 and (values.shape[2] > 256 or values.shape[1] > LIMITS.layers):
        raise trace_error(path, f"expected [tokens, layers, K], found {list(values.shape)}")
    tokens = parts.get("token_ids")
    weights = parts.get("weights")
    if weights is not None and (weights.shape != values.shape or weights.dtype.kind != "f"):
        raise trace_error(path, "weights: expected numbers of the shape of the ids")
    wide = values.astype(np.int64)
    if values.ndim == 2 and (wide < 0).any():
        raise trace_error(path, "counts: expected none below 0")
    return Held(
        wide,
        values.ndim == 2,
        None if weights is None else weights.astype(np.float32),
        None if tokens is None else _tokens(tokens, path),
    )


def _pairs(data: bytes, path: Path) -> Held:
    """Rows of `layer,expert`: counts, because they name no token."""
    if len(data) > MOST_BYTES:
        raise trace_error(path, f"larger than {MOST_BYTES:,} bytes")
    body = data[PAIRS.match(data).end() :]  # type: ignore[union-attr]
    rows = re.findall(rb"(\d{1,6})\s*,\s*(\d{1,6})", body)
    if len(rows) != sum(1 for line in body.splitlines() if line.strip()):
        raise trace_error(path, "expected two whole numbers in each row")
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    if not len(pairs) or pairs[:, 0].max() >= LIMITS.layers or pairs[:, 1].max() >= LIMITS.experts:
        raise trace_error(path, "expected layers and experts of a model")
    layers = np.unique(pairs[:, 0])
    counts = np.zeros((len(layers), int(pairs[:, 1].max()) + 1), np.int64)
    np.add.at(counts, (np.searchsorted(layers, pairs[:, 0]), pairs[:, 1]), 1)
    return Held(counts, True)


def dumps(tokens: NDArray[np.int64]) -> str:
    """Token ids as `read_tokens` takes them."""
    return json.dumps([int(token) for token in tokens])
