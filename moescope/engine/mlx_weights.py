"""From a checkpoint to MLX arrays, without torch: bytes go straight to where they stay.

numpy has no bfloat16, so halves are read as 16-bit integers and viewed as what they are. What is
packed in a way that MLX multiplies stays packed; everything else becomes dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine import devices
from moescope.engine.families import forms
from moescope.engine.load import Reporter, bytes_of, called, shortened
from moescope.engine.mlx_limits import KEPT, stays_packed
from moescope.engine.mlx_operators import DTYPES, Above, Packed, Stored
from moescope.engine.mlx_operators.matrix import accumulated
from moescope.engine.quantised import numbers, reading
from moescope.engine.quantised.packed import Packed as PublishedAsPacked

if TYPE_CHECKING:
    from moescope.engine.checkpoint import Checkpoint
    from moescope.engine.families.plans import Piece, Placement, Plan
    from moescope.engine.header import TensorInfo
    from moescope.engine.load import Inspected, Progress

Array = NDArray[Any]
_STORED = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
CHUNK = 64 << 20  # bytes read at once
_ROLES = ("weight", "scales", "biases")


def read(found: Inspected, progress: Progress) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of the plan by name, and notes where numbers are not finite. Experts are looked
    at where they are packed (a scale is many values): else theirs show in the next router."""
    checkpoint, plan = found.checkpoint, found.plan
    pieces = [piece for placement in plan.placements for piece in placement.pieces]
    report = Reporter(progress, bytes_of(pieces, checkpoint))
    weights: dict[str, Stored] = {}
    notes: list[str] = []
    for placement in plan.placements:
        dtype = found.dtype if placement.dtype == "model" else placement.dtype
        make = _packed if stays_packed(placement) else _dense
        try:
            tensor = make(placement, checkpoint, dtype, report)
        except (RuntimeError, MemoryError) as error:
            memory = {**found.memory, "free": devices.free_bytes("mlx")}
            raise devices.out_of_memory(memory) from error
        looked_at = len(placement.shape) < 3 or any(piece.packed for piece in placement.pieces)
        if looked_at and (count := _non_finite(tensor)):
            notes.append(f"{called(placement.target)} holds {count} values that are not finite")
        weights[placement.target] = tensor
    checkpoint.verify_unchanged()
    mx.clear_cache()
    return weights, shortened(notes)


def bytes_held(plan: Plan, checkpoint: Checkpoint, dtype: str) -> int:
    """What the weights of a plan take here; nothing is read."""
    total = 0
    for placement in plan.placements:
        held = DTYPES[dtype if placement.dtype == "model" else placement.dtype]
        if stays_packed(placement):
            total += _packed_bytes(placement, checkpoint, held)
        else:
            total += prod(placement.shape) * _held(placement, held).size
    return total


def _packed_bytes(placement: Placement, checkpoint: Checkpoint, dtype: mx.Dtype) -> int:
    """Codes as they are published, scales and biases as they are kept."""
    total = 0
    for piece in placement.pieces:
        for role, name in _roles(piece.packed):
            info = checkpoint.info(name)
            kept = prod(info.shape) * _kept_as(role, info, dtype).size
            total += info.nbytes if role == "weight" else kept
    return total


# --- packed -------------------------------------------------------------------------------------


def _packed(placement: Placement, checkpoint: Checkpoint, dtype: str, report: Reporter) -> Stored:
    """A tensor of ours as MLX multiplies it; parts of other bits one above another."""
    parts: list[Packed] = []
    for how, pieces in groupby(_by_place(placement.pieces), key=_how):
        parts.append(_one_packed(placement.shape, list(pieces), how, checkpoint, dtype, report))
    return parts[0] if len(parts) == 1 else Above(parts)


def _by_place(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of all experts that fill the same rows, together."""
    return sorted(pieces, key=lambda piece: (piece.start, piece.expert or 0))


def _how(piece: Piece) -> tuple[str, int, int]:
    assert piece.packed is not None
    return piece.packed.format, piece.packed.bits, piece.packed.group_size


def _one_packed(
    shape: tuple[int, ...],
    pieces: list[Piece],
    how: tuple[str, int, int],
    checkpoint: Checkpoint,
    dtype: str,
    report: Reporter,
) -> Packed:
    """Rows of `shape` [rows, columns] or [E, rows, columns], all packed alike."""
    format, bits, group = how
    first, last = pieces[0].start, pieces[-1].stop
    filled: dict[str, mx.array] = {}
    for role in _ROLES:
        infos = [checkpoint.info(n) for piece in pieces for n in _named(piece.packed, role)]
        if not infos:
            continue
        width = shape[-1] * bits // 32 if role == "weight" else shape[-1] // group
        kind = _kept_as(role, infos[0], DTYPES[dtype])
        numbers_of = _Numbers(kind, kind)
        whole = mx.zeros((*shape[:-2], last - first, width), numbers_of.bits)
        mx.eval(whole)
        target = np.array(whole, copy=False)
        for piece in pieces:
            (name,) = _named(piece.packed, role)
            report.what = checkpoint.info(name).shard
            rows = _rows(target, piece, first)
            _fill_role(rows, piece, name, checkpoint, numbers_of, report)
        filled[role] = whole.view(kind)
    arrays = (filled["weight"], filled["scales"], filled.get("biases"))
    return Packed(*arrays, group, bits, KEPT[format], DTYPES[dtype])


def _kept_as(role: str, info: TensorInfo, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of codes, scales and biases here."""
    if role == "weight":
        return mx.uint32
    return accumulated(dtype) if info.dtype in _STORED else mx.uint8


def _roles(packed: PublishedAsPacked | None) -> tuple[tuple[str, str], ...]:
    assert packed is not None
    return packed.tensors


def _named(packed: PublishedAsPacked | None, role: str) -> list[str]:
    return [name for found, name in _roles(packed) if found == role]


def _fill_role(
    rows: Array,
    piece: Piece,
    name: str,
    checkpoint: Checkpoint,
    numbers_of: _Numbers,
    report: Reporter,
) -> None:
    """Codes, scales or biases of one piece; in our order of rows."""
    info, form = checkpoint.info(name), forms.FORMS[piece.form]
    for block, out in enumerate(rows) if piece.blocks else [(None, rows)]:
        part = None if block is None else slice(block, block + 1)
        data = checkpoint.read_bytes(name, part)
        stored: Array
        if info.dtype in _STORED:
            stored = numbers_of(numbers.decode(info.dtype, data, out.shape))
        else:
            stored = np.frombuffer(data, out.dtype).reshape(out.shape)
        out[...] = stored if form.order is None else stored[form.order(len(stored), *piece.sizes)]
        report(len(data))


# --- dense --------------------------------------------------------------------------------------


def _dense(placement: Placement, checkpoint: Checkpoint, dtype: str, report: Reporter) -> mx.array:
    """A tensor of ours in `dtype`, filled from its pieces where it lies. MLX's CPU multiplies a row
    by a matrix that lies transposed more than twice as fast; Metal has kernels for either."""
    numbers_of = _Numbers(DTYPES[dtype], _held(placement, DTYPES[dtype]))
    turned = len(placement.shape) > 1 and not mx.metal.is_available()
    *lead, rows, columns = placement.shape if turned else (*placement.shape, 0, 0)
    whole = mx.zeros((*lead, columns, rows) if turned else placement.shape, numbers_of.bits)
    mx.eval(whole)
    target = np.array(whole, copy=False)  # the memory of `whole` itself
    target = target.swapaxes(-1, -2) if turned else target
    if placement.constant is not None:
        target[...] = numbers_of(np.full((), placement.constant, np.float32))
    for piece in placement.pieces:
        report.what = checkpoint.tensors[piece.published[0]].shard
        part = _rows(target, piece)
        if piece.packed is None:
            _fill(part, piece, checkpoint, numbers_of, report)
        else:
            for block, out in enumerate(part) if piece.blocks else [(None, part)]:
                _expand(out, piece, block, checkpoint, numbers_of, report)
    whole = whole.view(numbers_of.held)
    return whole.swapaxes(-1, -2) if turned else whole


def _held(placement: Placement, dtype: mx.Dtype) -> mx.Dtype:
    """What a dense tensor is kept in."""
    return accumulated(dtype) if len(placement.shape) == 3 else dtype


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers rounded to `dtype` and kept in `held`, which may be wider."""

    dtype: mx.Dtype
    held: mx.Dtype

    @property
    def bits(self) -> mx.Dtype:
        """What numpy knows it as."""
        return mx.uint16 if self.held.size == 2 else self.held

    def __call__(self, values: Array) -> Array:
        """float32, rounded to nearest, as numpy keeps it."""
        if self.dtype == mx.float32:
            return values
        rounded = mx.array(np.ascontiguousarray(values)).astype(self.dtype).astype(self.held)
        return np.array(rounded.view(self.bits))


def _rows(target: Array, piece: Piece, first: int = 0) -> Array:
    """The part of `target`, which begins at row `first` of ours, that a piece fills: rows of one
    expert's matrix, or of each block's."""
    span = slice(piece.start - first, piece.stop - first)
    if piece.expert is not None:
        return target[piece.expert, span]
    if not piece.blocks:
        return target[span]
    if target.ndim < len(piece.shape):
        target = target.reshape(piece.blocks, -1, *target.shape[1:])
    return target[:, span]


def _expand(
    out: Array,
    piece: Piece,
    block: int | None,
    checkpoint: Checkpoint,
    numbers_of: _Numbers,
    report: Reporter,
) -> None:
    """One packed matrix as numbers: some rows at a time, or whole where its form moves rows."""
    assert piece.packed is not None
    parts = reading.expanded(piece.packed, checkpoint, block, report)
    if piece.form == forms.PLAIN:
        for rows, values in parts:
            out[rows] = numbers_of(values)
        return
    stored = np.concatenate([values for _, values in parts])
    out[...] = numbers_of(forms.apply(piece.form, stored, out.shape, piece.sizes))


def _fill(
    rows: Array, piece: Piece, checkpoint: Checkpoint, numbers_of: _Numbers, report: Reporter
) -> None:
    """Read a piece into its rows, one expert's at a time, or as many rows as a chunk has."""
    info = checkpoint.info(piece.source)
    as_stored = _STORED.get(info.dtype) == numbers_of.dtype == numbers_of.held
    for out, part in _parts(rows, piece, info.shape, info.row_bytes):
        data = checkpoint.read_bytes(piece.source, part)
        shape = info.shape if part is None else (part.stop - part.start, *info.shape[1:])
        stored: Array
        if as_stored and not forms.FORMS[piece.form].minus:
            stored = np.frombuffer(data, out.dtype).reshape(shape)
            out[...] = forms.apply(piece.form, stored, out.shape, piece.sizes)
        else:
            stored = numbers.decode(info.dtype, data, shape)
            out[...] = numbers_of(forms.apply(piece.form, stored, out.shape, piece.sizes))
        report(len(data))


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


def _non_finite(tensor: Stored) -> int:
    """How many values are NaN or infinite; of what is packed, all that share such a scale."""
    if isinstance(tensor, Above):
        return sum(map(_non_finite, tensor.parts))
    if isinstance(tensor, Packed):
        arrays = [a for a in (tensor.scales, tensor.biases) if a is not None and a.dtype.size > 1]
        return max((_not_finite(a) for a in arrays), default=0) * tensor.group_size
    return _not_finite(tensor)


def _not_finite(array: mx.array) -> int:
    return int(np.count_nonzero(~np.array(mx.isfinite(array))))
