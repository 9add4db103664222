"""From a checkpoint to torch tensors, each read into its final place.

Experts go into one tensor per layer, so that little more than the weights is ever held; what is
packed is expanded, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moescope.engine import devices
from moescope.engine.families import forms
from moescope.engine.load import Counted, Reporter, bytes_of, called, shortened
from moescope.engine.quantised import reading

if TYPE_CHECKING:
    from moescope.engine.checkpoint import Checkpoint
    from moescope.engine.families.plans import Piece, Placement
    from moescope.engine.load import Inspected, Progress

PIECE = 4 << 20  # elements looked at together
READERS = 4  # threads: memory is touched for the first time while it is read into, which takes long


def read(found: Inspected, progress: Progress) -> tuple[dict[str, Tensor], list[str]]:
    """Fill every tensor of the plan; notes say where numbers are not finite. Experts are looked at
    where they are packed (a scale is many values): else theirs show in the next router, while
    attention's may vanish in a softmax."""
    checkpoint = found.checkpoint
    pieces = [piece for placement in found.plan.placements for piece in placement.pieces]
    report = Reporter(progress, bytes_of(pieces, checkpoint))
    weights: dict[str, Tensor] = {}
    notes: list[str] = []
    with _readers() as readers:
        for placement in found.plan.placements:
            target = _empty(placement, found)
            if placement.constant is not None:
                target.fill_(placement.constant)
            count = _filled(target, placement, checkpoint, report, readers)
            if len(placement.shape) < 3:
                count = _non_finite(target)
            if count:
                notes.append(f"{called(placement.target)} holds {count} values that are not finite")
            weights[placement.target] = target
    checkpoint.verify_unchanged()
    return weights, shortened(notes)


def _empty(placement: Placement, found: Inspected) -> Tensor:
    device = found.device_of(placement.target)
    dtype = found.dtype if placement.dtype == "model" else placement.dtype
    try:
        tensor = torch.empty(placement.shape, dtype=getattr(torch, dtype), device=device)
    except (RuntimeError, MemoryError) as error:
        memory = {**found.memory, "free": devices.free_bytes(device)}
        raise devices.out_of_memory(memory) from error
    if tensor.device.type == "cpu":
        devices.ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that read; what has not begun when an error or an interrupt ends reading, is not."""
    readers = ThreadPoolExecutor(min(READERS, torch.get_num_threads()), "reading")
    try:
        yield readers
    finally:
        readers.shutdown(cancel_futures=True)


def _filled(
    target: Tensor,
    placement: Placement,
    checkpoint: Checkpoint,
    report: Reporter,
    readers: ThreadPoolExecutor,
) -> int:
    """Read the pieces of a tensor, those of single experts beside each other: they are small, so
    what is held beside the weights stays so. Returns how many packed values are not finite."""

    def fill(piece: Piece) -> int:
        report.what = checkpoint.tensors[piece.published[0]].shard
        return _fill(target, piece, checkpoint, report)

    if all(piece.expert is not None for piece in placement.pieces):
        return sum(readers.map(fill, placement.pieces))
    return sum(map(fill, placement.pieces))


def _rows(target: Tensor, piece: Piece) -> Tensor:
    """The part of `target` that a piece fills: rows of one expert's matrix, or of each block's."""
    if piece.expert is not None:
        return target[piece.expert, piece.start : piece.stop]
    if not piece.blocks:
        return target[piece.start : piece.stop]
    if target.dim() < len(piece.shape):
        target = target.view(piece.blocks, -1, *target.shape[1:])
    return target[:, piece.start : piece.stop]


def _fill(target: Tensor, piece: Piece, checkpoint: Checkpoint, progress: Counted) -> int:
    """Read one piece into its rows; in another form, or packed, a matrix at a time beside them.
    Returns how many values of what was packed are not finite."""
    rows = _rows(target, piece)
    if piece.packed is not None:
        blocks = enumerate(rows) if piece.blocks else [(None, rows)]
        return sum(_expand(piece, out, block, checkpoint, progress) for block, out in blocks)
    if piece.form == forms.PLAIN:
        checkpoint.read_torch(piece.source, out=rows, progress=progress)
        return 0
    dtype = "float32" if forms.FORMS[piece.form].minus else None
    each = checkpoint.info(piece.source).shape[0] // piece.blocks if piece.blocks else 0
    for block, out in enumerate(rows) if piece.blocks else [(None, rows)]:
        part = None
        if block is not None:
            part = slice(block * each, (block + 1) * each)
        stored = checkpoint.read_torch(piece.source, rows=part, dtype=dtype, progress=progress)
        out.copy_(forms.apply(piece.form, stored, tuple(out.shape), piece.sizes))
    return 0


def _expand(
    piece: Piece, out: Tensor, block: int | None, checkpoint: Checkpoint, progress: Counted
) -> int:
    """One packed matrix into `out`: some rows at a time, or whole where its form moves rows.
    Returns how many of its values are not finite."""
    assert piece.packed is not None
    parts = reading.expanded(piece.packed, checkpoint, block, progress)
    if piece.form != forms.PLAIN:
        stored = np.concatenate([values for _, values in parts])
        values = forms.apply(piece.form, stored, tuple(out.shape), piece.sizes)
        parts = iter([(slice(None), values)])
    wrong = 0
    for rows, values in parts:
        out[rows].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if not np.isfinite(values.sum()):
            wrong += values.size - int(np.count_nonzero(np.isfinite(values)))
    return wrong


def _non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite; in pieces, and counted only where a sum is not finite,
    so that looking costs little time and less memory."""
    rows = max(1, PIECE // max(1, tensor[:1].numel()))
    parts = (tensor[at : at + rows] for at in range(0, len(tensor), rows))
    return sum(
        int((~part.isfinite()).sum())
        for part in parts
        if not math.isfinite(part.float().sum().item())
    )
