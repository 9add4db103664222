"""One frame as bytes, and back: a row of the tail, where the newest tokens are safe at once.

Every field is kept bit for bit, floats as float32. Many frames as columns are in `chunk.py`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.columns import ColumnError
from moescope.trace.fields import (
    ABOVE_LEVEL,
    ARRAYS,
    FLAGS,
    SHADOW,
    SHADOW_FIELDS,
    SHADOW_SUM,
    SHADOW_WEIGHTS,
    TOP1_AGREES,
    TOP1_KNOWN,
    flags_of,
    parse_json,
)
from moescope.trace.frames import Frame, RecordLevel

HEAD = struct.Struct("<ihiiBiffHHHHHHI")  # scalars, flags, L, K, E, alternatives, shadows, strings
SHADOW_HEAD = struct.Struct("<HH")  # its K, its flags
Arrays = tuple[bytes, bytes]  # int16, float32


def record(
    frame: Frame,
    level: RecordLevel = "logits",
    redact: bool = False,
    arrays: Arrays | None = None,
) -> bytes:
    """One frame as bytes, without what `level` leaves out (and without its token, if `redact`).

    `arrays` are those of the frame as they stand in a record, where somebody has them so: `ARRAYS`
    in their order, all int16 and then all float32. Raises ValueError or TypeError where arrays of
    the frame do not fit each other: our own mistake.
    """
    above = ABOVE_LEVEL[level]
    L, K = np.shape(frame.expert_ids)
    sizes = {"L": L, "K": K, "E": 0}
    if frame.logits is not None and "logits" not in above:
        sizes["E"] = np.shape(frame.logits)[1]
    flags = flags_of(frame, above)
    parts: list[bytes] = []
    if arrays is not None and not any(getattr(frame, name) is not None for name in above):
        _check_sizes(arrays, flags, **sizes)
        parts += arrays
    else:
        for name, dtype, letters, _ in ARRAYS:
            if name not in FLAGS or flags & FLAGS[name]:
                shape = [sizes[x] for x in letters]
                parts.append(_exactly(getattr(frame, name), dtype, shape, name))
    shadows = {} if frame.shadow is None else frame.shadow
    for name, shadow in shadows.items():
        parts.append(_shadow_bytes(name, shadow, sizes["L"], level))
    alternatives = () if redact else frame.alternatives
    text = "" if redact else frame.text
    strings = json.dumps([text, frame.variant, list(shadows)]).encode()
    head = HEAD.pack(
        frame.sequence,
        frame.lane,
        frame.position,
        -1 if redact else frame.token_id,
        frame.phase,
        -1 if frame.rank is None else frame.rank,
        np.nan if frame.logprob is None else frame.logprob,
        np.nan if frame.kl is None else frame.kl,
        flags,
        sizes["L"],
        sizes["K"],
        sizes["E"],
        len(alternatives),
        len(shadows),
        len(strings),
    )
    ids_bytes = struct.pack(f"<{len(alternatives)}i", *[a[0] for a in alternatives])
    logprob_bytes = np.array([a[1] for a in alternatives], dtype="<f4").tobytes()
    return b"".join((head, strings, ids_bytes, logprob_bytes, *parts))


def _check_sizes(arrays: Arrays, flags: int, L: int, K: int, E: int) -> None:
    picks = bool(flags & FLAGS["weights"]) + bool(flags & FLAGS["scores"])
    sizes = 2 * L * (K + 1), 4 * L * (4 + picks * K + E)
    if (len(arrays[0]), len(arrays[1])) != sizes:
        raise ValueError(f"frame: arrays: expected {sizes} bytes, found {[*map(len, arrays)]}")


def _exactly(value: Any, dtype: str, shape: Sequence[int], name: str) -> bytes:
    array = np.asarray(value, dtype=dtype)
    if array.shape != tuple(shape):
        raise ValueError(f"frame: {name}: expected shape {tuple(shape)}, found {array.shape}")
    return array.tobytes()


def _shadow_bytes(name: str, shadow: dict[str, Any], routers: int, level: RecordLevel) -> bytes:
    unknown = set(shadow) - set(SHADOW_FIELDS)
    if unknown:
        raise TypeError(f"frame: shadow {name}: unknown fields {sorted(unknown)}")
    ids = np.asarray(shadow["expert_ids"], dtype="<i2")
    weights = None if level == "ids" else shadow.get("weights")
    total = shadow.get("score_sum")
    flags = (weights is not None) * SHADOW_WEIGHTS | (total is not None) * SHADOW_SUM
    parts = [SHADOW_HEAD.pack(ids.shape[1], flags)]
    parts.append(_exactly(ids, "<i2", (routers, ids.shape[1]), f"shadow {name}"))
    if weights is not None:
        parts.append(_exactly(weights, "<f4", ids.shape, f"shadow {name} weights"))
    if total is not None:
        parts.append(_exactly(total, "<f4", (routers,), f"shadow {name} score_sum"))
    return b"".join(parts)


class _Cursor:
    """Reads arrays off a record, one after the other; a record that is too short is not ours."""

    def __init__(self, blob: bytes, offset: int) -> None:
        self.blob, self.offset = blob, offset

    def array(self, dtype: str, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        end = self.offset + count * np.dtype(dtype).itemsize
        if end > len(self.blob):
            raise ColumnError("ends too early")
        array = np.frombuffer(self.blob, dtype=dtype, count=count, offset=self.offset)
        self.offset = end
        return array.reshape(shape)


def frame_of(blob: bytes) -> Frame:
    """The frame of a record. Raises `ColumnError` for bytes that `record` does not write."""
    if len(blob) < HEAD.size:
        raise ColumnError("ends too early")
    (
        sequence,
        lane,
        position,
        token_id,
        phase,
        rank,
        logprob,
        kl,
        flags,
        routers,
        k,
        e,
        n,
        s,
        text,
    ) = HEAD.unpack_from(blob)
    text_end = HEAD.size + text
    strings = parse_json(blob[HEAD.size : text_end])
    if not (isinstance(strings, list) and len(strings) == 3 and isinstance(strings[2], list)):
        raise ColumnError("holds no text")
    if not all(isinstance(x, str) for x in (*strings[:2], *strings[2])) or len(strings[2]) != s:
        raise ColumnError("holds no text")
    cursor = _Cursor(blob, text_end)
    ids, logprobs = cursor.array("<i4", n), cursor.array("<f4", n)
    sizes = {"L": routers, "K": k, "E": e}
    arrays = {
        name: cursor.array(dtype, *(sizes[x] for x in letters))
        for name, dtype, letters, _ in ARRAYS
        if name not in FLAGS or flags & FLAGS[name]
    }
    shadow = {name: _shadow_of(cursor, routers) for name in strings[2]} if flags & SHADOW else None
    if cursor.offset != len(blob):
        raise ColumnError("has bytes after its end")
    return Frame(
        sequence=sequence,
        lane=lane,
        position=position,
        token_id=token_id,
        text=strings[0],
        phase=phase,
        variant=strings[1],
        logprob=logprob if flags & FLAGS["logprob"] else None,
        rank=rank if flags & FLAGS["rank"] else None,
        alternatives=tuple(zip(ids.tolist(), logprobs.tolist(), strict=True)),
        kl=kl if flags & FLAGS["kl"] else None,
        top1_agrees=bool(flags & TOP1_AGREES) if flags & TOP1_KNOWN else None,
        shadow=shadow,
        **arrays,
    )


def _shadow_of(cursor: _Cursor, routers: int) -> dict[str, Any]:
    k, flags = (int(x) for x in cursor.array("<u2", 2))
    shadow: dict[str, Any] = {"expert_ids": cursor.array("<i2", routers, k)}
    if flags & SHADOW_WEIGHTS:
        shadow["weights"] = cursor.array("<f4", routers, k)
    if flags & SHADOW_SUM:
        shadow["score_sum"] = cursor.array("<f4", routers)
    return shadow
