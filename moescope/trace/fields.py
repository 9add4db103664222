"""What of a frame is stored, and as what: the tables that records and columns are made from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.columns import ColumnError
from moescope.trace.frames import Frame, RecordLevel

Columns = dict[str, NDArray[Any]]

# name, dtype, letters of its shape, what fills unused slots
ARRAYS: tuple[tuple[str, str, str, float], ...] = (
    ("expert_ids", "<i2", "LK", -1),
    ("runner_up", "<i2", "L", -1),
    ("score_sum", "<f4", "L", np.nan),
    ("mass", "<f4", "L", np.nan),
    ("entropy", "<f4", "L", np.nan),
    ("margin", "<f4", "L", np.nan),
    ("weights", "<f4", "LK", 0),
    ("scores", "<f4", "LK", 0),
    ("logits", "<f4", "LE", np.nan),
)
SCALARS: tuple[tuple[str, str], ...] = (
    ("sequence", "<i4"),
    ("lane", "<i2"),
    ("position", "<i4"),
    ("token_id", "<i4"),
    ("phase", "|u1"),
    ("rank", "<i4"),
    ("logprob", "<f4"),
    ("kl", "<f4"),
)
# What a frame has, one bit each: None and NaN are different things.
FLAGS = {"weights": 1, "scores": 2, "logits": 4, "logprob": 8, "rank": 16, "kl": 32}
TOP1_KNOWN, TOP1_AGREES, SHADOW = 64, 128, 256
ABOVE_LEVEL: dict[RecordLevel, tuple[str, ...]] = {
    "ids": ("weights", "scores", "logits"),
    "weights": ("logits",),
    "logits": (),
}
SHADOW_FIELDS = ("expert_ids", "weights", "score_sum")
SHADOW_WEIGHTS, SHADOW_SUM = 1, 2


def flags_of(frame: Frame, above: tuple[str, ...] = ()) -> int:
    """The bits of `FLAGS` that a frame has, without the fields named in `above`."""
    flags = 0
    for name, bit in FLAGS.items():
        if name not in above and getattr(frame, name) is not None:
            flags |= bit
    if frame.top1_agrees is not None:
        flags |= TOP1_KNOWN | (TOP1_AGREES if frame.top1_agrees else 0)
    return flags | (0 if frame.shadow is None else SHADOW)


def parse_json(data: bytes) -> Any:
    """JSON of a stranger. Raises `ColumnError` where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ColumnError("holds text that is not JSON") from error
