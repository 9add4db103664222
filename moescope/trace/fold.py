"""Records of the tail as the columns of a chunk, straight from their bytes.

Records of one run are alike: the same arrays in the same shapes. Then a column is a slice of all
records side by side, and no frame is made. Records that differ go through frames. Either way the
columns are those of `chunk.columns_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.chunk import columns_of, summary
from moescope.trace.fields import (
    ARRAYS,
    FLAGS,
    SCALARS,
    SHADOW,
    SHADOW_SUM,
    SHADOW_WEIGHTS,
    Columns,
    parse_json,
)
from moescope.trace.record import HEAD, frame_of

_DTYPES = dict(SCALARS)
_SCALARS = ("sequence", "lane", "position", "token_id", "phase", "rank", "logprob", "kl")
_COUNTS = ("flags", "L", "K", "E", "alternatives", "shadows")
_HEADS = np.dtype(  # `HEAD`, which has no padding
    [(name, _DTYPES[name]) for name in _SCALARS]
    + [(name, "<u2") for name in _COUNTS]
    + [("text", "<u4")]
)
_ALIKE = ("L", "K", "E", "alternatives", "shadows")
_HELD = FLAGS["weights"] | FLAGS["scores"] | FLAGS["logits"] | SHADOW


def columns_of_records(blobs: Sequence[bytes]) -> Columns:
    """At least one record, as `record` makes them, as columns [n, ...]."""
    heads = np.frombuffer(b"".join(blob[: HEAD.size] for blob in blobs), _HEADS)
    alike = all((heads[name] == heads[name][0]).all() for name in _ALIKE)
    held = heads["flags"] & _HELD
    columns = _columns(blobs, heads) if alike and (held == held[0]).all() else None
    return columns_of([frame_of(blob) for blob in blobs]) if columns is None else columns


def _columns(blobs: Sequence[bytes], heads: NDArray[Any]) -> Columns | None:
    """None where records turn out to differ in their shadows."""
    flags, sizes = int(heads["flags"][0]), {letter: int(heads[letter][0]) for letter in "LKE"}
    begins = (HEAD.size + heads["text"].astype(np.int64)).tolist()
    words = b",".join(blob[HEAD.size : at] for blob, at in zip(blobs, begins, strict=True))
    texts, variants, shadows = zip(*parse_json(b"[" + words + b"]"), strict=True)
    pieces = [blob[at:] for blob, at in zip(blobs, begins, strict=True)]
    if any(names != shadows[0] for names in shadows) or len({*map(len, pieces)}) > 1:
        return None
    rest = _Side(pieces)
    columns: Columns = {name: heads[name].copy() for name in ("flags", *_SCALARS)}
    columns["shape"] = np.stack([heads[letter] for letter in "LKE"], axis=1)
    if count := int(heads["alternatives"][0]):
        columns["alternatives"] = heads["alternatives"].copy()
        columns["alternatives.ids"] = rest.take("<i4", count)
        columns["alternatives.logprobs"] = rest.take("<f4", count)
    for name, dtype, letters, _ in ARRAYS:
        if name not in FLAGS or flags & FLAGS[name]:
            columns[name] = rest.take(dtype, *(sizes[letter] for letter in letters))
    for number in range(len(shadows[0])):
        found = _shadow(rest, sizes["L"])
        if found is None:
            return None
        columns |= {f"shadow{number}{name}": column for name, column in found.items()}
    return columns | summary(columns, texts, variants, shadows[0])


def _shadow(rest: _Side, L: int) -> Columns | None:
    """The next shadow variant of all records; None where they hold different things of it."""
    head = rest.take("<u2", 2)
    if (head != head[0]).any():
        return None
    K, flags = (int(number) for number in head[0])
    found: Columns = {"": head.astype("<i2"), ".expert_ids": rest.take("<i2", L, K)}
    n = len(head)
    found[".weights"] = np.zeros((n, L, K), "<f4")
    found[".score_sum"] = np.full((n, L), np.nan, "<f4")
    if flags & SHADOW_WEIGHTS:
        found[".weights"] = rest.take("<f4", L, K)
    if flags & SHADOW_SUM:
        found[".score_sum"] = rest.take("<f4", L)
    return found


class _Side:
    """Equally long pieces of bytes side by side, from which columns are cut one after the other."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8).reshape(len(pieces), -1)
        self._at = 0

    def take(self, dtype: str, *shape: int) -> NDArray[Any]:
        """The next column [n, *shape]."""
        begin = self._at
        self._at += int(np.prod(shape)) * np.dtype(dtype).itemsize
        held = np.ascontiguousarray(self._bytes[:, begin : self._at])
        return held.view(dtype).reshape(len(held), *shape)
