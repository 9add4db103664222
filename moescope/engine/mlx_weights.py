"""From a checkpoint to MLX arrays, without torch: bytes go straight to where they stay.

numpy has no bfloat16, so halves are read as 16-bit integers and viewed as what they are. What is
packed in a way that MLX multiplies stays packed; everything else becomes dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine import devices
from moescope.engine.families import forms
from moescope.engine.load import Reporter, bytes_of, called, shortened
from moescope.engine.mlx_operators import DTYPES, Stored
from moescope.engine.quantised import numbers, reading

if TYPE_CHECKING:
    from moescope.engine.checkpoint import Checkpoint
    from moescope.engine.families.places import Piece, Placement
    from moescope.engine.load import Inspected, Progress

Array = NDArray[Any]
_BITS = {"F32": np.float32, "BF16": np.uint16, "F16": np.uint16}  # how numpy holds what is stored
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CHUNK = 64 << 20  # bytes read at once


def read(found: Inspected, progress: Progress) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of the plan by name, and notes where numbers are not finite. Experts are not
    looked at: theirs show in the next router."""
    checkpoint = found.checkpoint
    pieces = [piece for placement in found.plan.placements for piece in placement.pieces]
    report = Reporter(progress, bytes_of(pieces, checkpoint))
    weights: dict[str, Stored] = {}
    notes: list[str] = []
    for placement in found.plan.placements:
        try:
            tensor = _dense(placement, checkpoint, found.dtype, report)
        except (RuntimeError, MemoryError) as error:
            memory = {**found.memory, "free": devices.free_bytes("mlx")}
            raise devices.out_of_memory(memory) from error
        if len(placement.shape) < 3 and (count := _non_finite(tensor)):
            notes.append(f"{called(placement.target)} holds {count} values that are not finite")
        weights[placement.target] = tensor
    checkpoint.verify_unchanged()
    mx.clear_cache()
    return weights, shortened(notes)


def _dense(placement: Placement, checkpoint: Checkpoint, dtype: str, report: Reporter) -> mx.array:
    """A tensor of ours in `dtype`, filled from its pieces where it lies."""
    held = mx.float32 if dtype == "float32" else mx.uint16
    whole = mx.zeros(placement.shape, held)
    mx.eval(whole)
    target = np.array(whole, copy=False)  # the memory of `whole` itself
    if placement.constant is not None:
        target[...] = _as(np.full((), placement.constant, np.float32), dtype)
    for piece in placement.pieces:
        report.what = checkpoint.tensors[piece.published[0]].shard
        _fill(_rows(target, piece), piece, checkpoint, dtype, report)
    return whole if dtype == "float32" else whole.view(DTYPES[dtype])


def _rows(target: Array, piece: Piece) -> Array:
    """The part of `target` that a piece fills: rows of one expert's matrix, or of each block's."""
    if piece.expert is not None:
        return target[piece.expert, piece.start : piece.stop]
    if not piece.blocks:
        return target[piece.start : piece.stop]
    if target.ndim < len(piece.shape):
        target = target.reshape(piece.blocks, -1, *target.shape[1:])
    return target[:, piece.start : piece.stop]


def _fill(rows: Array, piece: Piece, checkpoint: Checkpoint, dtype: str, report: Reporter) -> None:
    """Read a piece into its rows, one expert's at a time, or as many rows as a chunk has."""
    if piece.packed is not None:
        _expand(rows, piece, checkpoint, dtype, report)
        return
    info = checkpoint.info(piece.source)
    for out, part in _parts(rows, piece, info.shape, info.row_bytes):
        data = checkpoint.read_bytes(piece.source, part)
        shape = info.shape if part is None else (part.stop - part.start, *info.shape[1:])
        stored: Array
        if _NAMES[info.dtype] == dtype and not forms.FORMS[piece.form].minus:
            stored = np.frombuffer(data, _BITS[info.dtype]).reshape(shape)
            out[...] = forms.apply(piece.form, stored, out.shape, piece.sizes)
        else:
            stored = numbers.decode(info.dtype, data, shape)
            out[...] = _as(forms.apply(piece.form, stored, out.shape, piece.sizes), dtype)
        report(len(data))


def _expand(
    rows: Array, piece: Piece, checkpoint: Checkpoint, dtype: str, report: Reporter
) -> None:
    """The numbers of a packed piece into its rows, one matrix at a time."""
    assert piece.packed is not None
    for block, out in enumerate(rows) if piece.blocks else [(None, rows)]:
        parts = reading.expanded(piece.packed, checkpoint, block, report)
        if piece.form == forms.PLAIN:
            for part, values in parts:
                out[part] = _as(values, dtype)
            continue
        stored = np.concatenate([values for _, values in parts])
        out[...] = _as(forms.apply(piece.form, stored, out.shape, piece.sizes), dtype)


def _parts(
    rows: Array, piece: Piece, stored: Sequence[int], row_bytes: int
) -> Iterator[tuple[Array, slice | None]]:
    """Pieces of the rows, and the stored rows (None: all) that each is made of."""
    if piece.blocks:
        each = stored[0] // piece.blocks
        for block, out in enumerate(rows):
            yield out, slice(block * each, (block + 1) * each)
    elif piece.form != forms.PLAIN or not stored:
        yield rows, None
    else:
        count = max(1, CHUNK // max(1, row_bytes))
        for start in range(0, len(rows), count):
            yield rows[start : start + count], slice(start, min(start + count, len(rows)))


def _as(values: Array, dtype: str) -> Array:
    """float32 as what numpy holds `dtype` in, rounded to nearest."""
    if dtype == "float32":
        return values
    narrow = mx.array(np.ascontiguousarray(values)).astype(DTYPES[dtype])
    return np.array(narrow.view(mx.uint16))


def _non_finite(tensor: mx.array) -> int:
    """How many values are NaN or infinite."""
    return int(mx.sum(~mx.isfinite(tensor)).item())
