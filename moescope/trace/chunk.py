"""Many frames as columns, and back: a chunk of a trace, small, each column readable alone.

Every field is kept bit for bit, floats as float32. Arrays become blobs in `columns.py`; one frame
as bytes is in `record.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.columns import ColumnError
from moescope.trace.fields import (
    ARRAYS,
    FLAGS,
    SCALARS,
    SHADOW,
    SHADOW_FIELDS,
    SHADOW_SUM,
    SHADOW_WEIGHTS,
    TOP1_AGREES,
    TOP1_KNOWN,
    Columns,
    flags_of,
    parse_json,
)
from moescope.trace.frames import Frame


def columns_of(frames: Sequence[Frame]) -> Columns:
    """At least one frame as columns [n, ...], padded to the largest L, K and E among them."""
    shapes = np.array([_shape(frame) for frame in frames], dtype="<u2")
    largest = dict(zip("LKE", shapes.max(axis=0).tolist(), strict=True))
    flags = np.array([flags_of(frame) for frame in frames], dtype="<u2")
    columns: Columns = {"flags": flags, "shape": shapes}
    for name, dtype in SCALARS:
        missing = -1 if name == "rank" else np.nan
        values = [getattr(frame, name) for frame in frames]
        columns[name] = np.array([missing if v is None else v for v in values], dtype=dtype)
    for name, dtype, letters, fill in ARRAYS:
        if name in FLAGS and not np.any(flags & FLAGS[name]):
            continue
        shape = [largest[x] for x in letters]
        columns[name] = stacked((getattr(f, name) for f in frames), len(frames), dtype, shape, fill)
    columns |= _alternatives(frames)
    columns |= _shadow_columns(frames, largest["L"])
    texts, variants = [frame.text for frame in frames], [frame.variant for frame in frames]
    return columns | summary(columns, texts, variants, _shadow_names(frames))


def summary(
    columns: Columns, texts: Sequence[str], variants: Sequence[str], shadows: Sequence[str]
) -> Columns:
    """The columns made from others, and from the words of every frame."""
    number = {variant: i for i, variant in enumerate(dict.fromkeys(variants))}
    strings = {"variants": list(number), "shadows": list(shadows), "text": list(texts)}
    lanes, counts = _counts(columns)
    return {
        "variant": np.array([number[variant] for variant in variants], dtype="<u2"),
        "strings": np.frombuffer(json.dumps(strings).encode(), dtype=np.uint8),
        "counts_lanes": lanes,
        "counts": counts,
    }


def _shape(frame: Frame) -> tuple[int, int, int]:
    classes = 0 if frame.logits is None else frame.logits.shape[1]
    routers, k = frame.expert_ids.shape
    return routers, k, classes


def stacked(
    arrays: Iterable[NDArray[Any] | None], n: int, dtype: str, shape: Sequence[int], fill: float
) -> NDArray[Any]:
    """Arrays of at most `shape` as one [n, *shape]; what is missing holds `fill`."""
    whole = np.full((n, *shape), fill, dtype=dtype)
    for i, array in enumerate(arrays):
        if array is not None:
            whole[i][tuple(slice(size) for size in array.shape)] = array
    return whole


def _alternatives(frames: Sequence[Frame]) -> Columns:
    counts = np.array([len(frame.alternatives) for frame in frames], dtype="<u2")
    if not counts.any():
        return {}
    ids = np.full((len(frames), counts.max()), -1, dtype="<i4")
    logprobs = np.full(ids.shape, np.nan, dtype="<f4")
    for i, frame in enumerate(frames):
        for j, (token_id, logprob) in enumerate(frame.alternatives):
            ids[i, j], logprobs[i, j] = token_id, logprob
    return {"alternatives": counts, "alternatives.ids": ids, "alternatives.logprobs": logprobs}


def _shadow_names(frames: Sequence[Frame]) -> list[str]:
    return list(dict.fromkeys(name for frame in frames for name in frame.shadow or ()))


def _shadow_columns(frames: Sequence[Frame], routers: int) -> Columns:
    columns: Columns = {}
    for j, name in enumerate(_shadow_names(frames)):
        shadows = [(frame.shadow or {}).get(name) for frame in frames]
        heads = np.full((len(frames), 2), -1, dtype="<i2")  # K and flags; -1: not evaluated
        for i, shadow in enumerate(shadows):
            if shadow is not None:
                has_weights = shadow.get("weights") is not None
                has_sum = shadow.get("score_sum") is not None
                heads[i] = (
                    shadow["expert_ids"].shape[1],
                    has_weights * SHADOW_WEIGHTS | has_sum * SHADOW_SUM,
                )
        columns[f"shadow{j}"] = heads
        k = max(int(heads[:, 0].max()), 0)
        fields = zip(SHADOW_FIELDS, ("<i2", "<f4", "<f4"), (-1, 0, np.nan), strict=True)
        for field, dtype, fill in fields:
            shape = (routers,) if field == "score_sum" else (routers, k)
            values = [None if shadow is None else shadow.get(field) for shadow in shadows]
            columns[f"shadow{j}.{field}"] = stacked(values, len(frames), dtype, shape, fill)
    return columns


def _counts(columns: Columns) -> tuple[NDArray[Any], NDArray[Any]]:
    """Picks per lane, router and expert of these frames: lanes [N] and counts [N, L, E]."""
    ids, lanes = columns["expert_ids"], np.unique(columns["lane"])
    classes = int(ids.max(initial=-1)) + 1
    counts = np.zeros((len(lanes), ids.shape[1], classes), dtype="<u4")
    cells = np.arange(ids.shape[1])[:, None] * classes + ids
    for i, lane in enumerate(lanes):
        mine = columns["lane"] == lane
        picked = cells[mine][ids[mine] >= 0]
        counts[i] = np.bincount(picked, minlength=counts[i].size).reshape(counts[i].shape)
    return lanes, counts


class ChunkStrings:
    """The text of a chunk, parsed once: `variants`, `shadows`, and `text` per frame."""

    def __init__(self, column: NDArray[Any], count: int) -> None:
        parsed = parse_json(column.tobytes())
        if not isinstance(parsed, dict):
            raise ColumnError("holds no text")
        lists = [parsed.get(key) for key in ("variants", "shadows", "text")]
        for strings in lists:
            if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
                raise ColumnError("holds no text")
        self.variants, self.shadows, self.text = lists[0] or [], lists[1] or [], lists[2] or []
        if len(self.text) != count:
            raise ColumnError("holds the text of another number of frames")


def frames_of(columns: Columns, strings: ChunkStrings, start: int, stop: int) -> list[Frame]:
    """Frames `start` to `stop` of a chunk. Arrays are views: nobody writes to them."""
    return [_frame_at(columns, strings, i) for i in range(start, stop)]


def _frame_at(columns: Columns, strings: ChunkStrings, i: int) -> Frame:
    flags = int(columns["flags"][i])
    routers, k, e = (int(x) for x in columns["shape"][i])
    width = {"LK": k, "LE": e}
    arrays: dict[str, Any] = {}
    for name, _, letters, _ in ARRAYS:
        if (name not in FLAGS or flags & FLAGS[name]) and name in columns:
            rows = columns[name][i, :routers]
            arrays[name] = rows[:, : width[letters]] if letters in width else rows
    alternatives: tuple[tuple[int, float], ...] = ()
    if "alternatives" in columns and (n := int(columns["alternatives"][i])):
        ids, logprobs = columns["alternatives.ids"][i, :n], columns["alternatives.logprobs"][i, :n]
        alternatives = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return Frame(
        sequence=int(columns["sequence"][i]),
        lane=int(columns["lane"][i]),
        position=int(columns["position"][i]),
        token_id=int(columns["token_id"][i]),
        text=strings.text[i],
        phase=int(columns["phase"][i]),
        variant=strings.variants[columns["variant"][i]],
        logprob=float(columns["logprob"][i]) if flags & FLAGS["logprob"] else None,
        rank=int(columns["rank"][i]) if flags & FLAGS["rank"] else None,
        alternatives=alternatives,
        kl=float(columns["kl"][i]) if flags & FLAGS["kl"] else None,
        top1_agrees=bool(flags & TOP1_AGREES) if flags & TOP1_KNOWN else None,
        shadow=_shadow_at(columns, strings, i, routers) if flags & SHADOW else None,
        **arrays,
    )


def _shadow_at(columns: Columns, strings: ChunkStrings, i: int, routers: int) -> dict[str, Any]:
    shadow: dict[str, Any] = {}
    for j, name in enumerate(strings.shadows):
        k, flags = (int(x) for x in columns[f"shadow{j}"][i])
        if k < 0:
            continue
        entry = {"expert_ids": columns[f"shadow{j}.expert_ids"][i, :routers, :k]}
        if flags & SHADOW_WEIGHTS:
            entry["weights"] = columns[f"shadow{j}.weights"][i, :routers, :k]
        if flags & SHADOW_SUM:
            entry["score_sum"] = columns[f"shadow{j}.score_sum"][i, :routers]
        shadow[name] = entry
    return shadow
