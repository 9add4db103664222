"""Packed tensors of a checkpoint as numbers, some rows at a time: little is held beside the result.

Where they go is the interpreters' affair: torch's is `load`, MLX's is `mlx_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from moescope.engine.checkpoint import Checkpoint
from moescope.engine.quantised.formats import FORMATS, expand
from moescope.engine.quantised.numbers import Array, decode
from moescope.engine.quantised.packed import Packed

READ = 16 << 20  # values whose published tensors are read at once
EXPAND = 1 << 20  # values expanded at once, so that they stay in a cache
Counted = Callable[[int], None]


def expanded(
    packed: Packed,
    checkpoint: Checkpoint,
    block: int | None = None,
    progress: Counted = lambda count: None,
) -> Iterator[tuple[slice, Array]]:
    """Rows of a matrix and their numbers in float32, from the first to the last; of matrix `block`
    where `packed` stands for a stack of them."""
    rows, columns = packed.shape[-2:]
    by_rows = FORMATS[packed.format].by_rows
    at_once = READ if by_rows and block is None else rows * columns
    for some in _spans(rows, columns, packed.block_rows, at_once):
        arrays = _read(packed, checkpoint, block, some, progress)
        count = some.stop - some.start
        for few in _spans(count, columns, packed.block_rows, EXPAND if by_rows else at_once):
            part = {role: _cut(array, per, few) for role, (array, per) in arrays.items()}
            values = expand(replace(packed, shape=(few.stop - few.start, columns)), part)
            yield slice(some.start + few.start, some.start + few.stop), values


def _spans(rows: int, columns: int, block_rows: int, values: int) -> Iterator[slice]:
    """Rows in spans of about so many values, none of which begins within a block of rows."""
    block = max(block_rows, 1)
    step = max(1, values // max(columns, 1) // block) * block
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _read(
    packed: Packed, checkpoint: Checkpoint, block: int | None, rows: slice, progress: Counted
) -> dict[str, tuple[Array, int]]:
    """By role, an array and how many of our rows each of its rows is about; 0: it is about all."""
    kinds = FORMATS[packed.format].roles
    found = {}
    for role, name in packed.tensors:
        if not kinds[role].read:
            continue
        info = checkpoint.info(name)
        part: slice | None = None
        shape, per = info.shape, 0
        if block is not None and shape[:1] == packed.shape[:1]:
            part, shape = slice(block, block + 1), shape[1:]
            per = _rows_per(shape, packed)
        elif FORMATS[packed.format].by_rows and (per := _rows_per(shape, packed)):
            part = _entries(rows, per)
            shape = (part.stop - part.start, *shape[1:])
        data = checkpoint.read_bytes(name, part)
        progress(len(data))
        found[role] = (decode(info.dtype, data, shape), per)
    return found


def _rows_per(shape: tuple[int, ...], packed: Packed) -> int:
    rows = packed.shape[-2]
    if shape[:1] == (rows,):
        return 1
    block = packed.block_rows
    return block if block > 1 and shape[:1] == (-(-rows // block),) else 0


def _entries(rows: slice, per: int) -> slice:
    return slice(rows.start // per, -(-rows.stop // per))


def _cut(array: Array, per: int, rows: slice) -> Array:
    return array[_entries(rows, per)] if per else array
