"""Records of the tail as the columns of a chunk, straight from their bytes.

Records of one run are alike: the same arrays in the same shapes. Then a column is a slice of all
records side by side, and no frame is made. Records that differ, or hold shadow variants, go through
frames. Either way the columns are those of `chunk.columns_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.chunk import columns_of, summary
from moescope.trace.fields import ARRAYS, FLAGS, SCALARS, SHADOW, Columns, parse_json
from moescope.trace.record import HEAD, frame_of

_DTYPES = dict(SCALARS)
_SCALARS = ("sequence", "lane", "position", "token_id", "phase", "rank", "logprob", "kl")
_COUNTS = ("flags", "L", "K", "E", "alternatives", "shadows")
_HEADS = np.dtype(  # `HEAD`, which has no padding
    [(name, _DTYPES[name]) for name in _SCALARS]
    + [(name, "<u2") for name in _COUNTS]
    + [("text", "<u4")]
)
_ALIKE = ("L", "K", "E", "alternatives")
_HELD = FLAGS["weights"] | FLAGS["scores"] | FLAGS["logits"] | SHADOW


def columns_of_records(blobs: Sequence[bytes]) -> Columns:
    """At least one record, as `record` makes them, as columns [n, ...]."""
    heads = np.frombuffer(b"".join(blob[: HEAD.size] for blob in blobs), _HEADS)
    held = heads["flags"] & _HELD
    alike = all((heads[name] == heads[name][0]).all() for name in _ALIKE)
    if not alike or (held != held[0]).any() or held[0] & SHADOW:
        return columns_of([frame_of(blob) for blob in blobs])
    return _columns(blobs, heads)


def _columns(blobs: Sequence[bytes], heads: NDArray[Any]) -> Columns:
    n, flags = len(blobs), int(heads["flags"][0])
    sizes = {letter: int(heads[letter][0]) for letter in "LKE"}
    columns: Columns = {name: heads[name].copy() for name in ("flags", *_SCALARS)}
    columns["shape"] = np.stack([heads[letter] for letter in "LKE"], axis=1)
    begins = (HEAD.size + heads["text"].astype(np.int64)).tolist()
    rest = _Side([blob[at:] for blob, at in zip(blobs, begins, strict=True)])
    if count := int(heads["alternatives"][0]):
        columns["alternatives"] = heads["alternatives"].copy()
        columns["alternatives.ids"] = rest.take("<i4", count)
        columns["alternatives.logprobs"] = rest.take("<f4", count)
    for name, dtype, letters, _ in ARRAYS:
        if name not in FLAGS or flags & FLAGS[name]:
            columns[name] = rest.take(dtype, *(sizes[letter] for letter in letters))
    words = b",".join(blob[HEAD.size : at] for blob, at in zip(blobs, begins, strict=True))
    texts, variants, _ = zip(*parse_json(b"[" + words + b"]"), strict=True)
    assert len(texts) == n
    return columns | summary(columns, texts, variants, ())


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
