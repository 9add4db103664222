"""Frames and traces made up for tests: plausible by default, odd on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moescope.trace.frames import Frame, RecordLevel, RouterInfo, TraceEvent, TraceMeta
from moescope.trace.store import TraceReader, TraceWriter


def a_meta(
    routers: int = 4, experts: int = 16, k: int = 2, record: RecordLevel = "logits", **more: Any
) -> TraceMeta:
    infos = tuple(
        RouterInfo(i, experts, 0, k, {"policy": {"num_experts_per_tok": k}}) for i in range(routers)
    )
    return TraceMeta(models=({"name": "made-up"},), routers=infos, record=record, **more)


def a_frame(
    position: int = 0,
    *,
    lane: int = 0,
    sequence: int = 0,
    routers: int = 4,
    experts: int = 16,
    k: int = 2,
    **changes: Any,
) -> Frame:
    """A frame whose numbers follow from its place, as softmax, top-k routing would make them."""
    rng = np.random.default_rng((sequence, lane, position))
    logits = (2 * rng.standard_normal((routers, experts))).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")
    ids = order[:, :k].astype(np.int16)
    scores = np.take_along_axis(probabilities, order[:, : k + 1], axis=1)
    fields: dict[str, Any] = {
        "sequence": sequence,
        "lane": lane,
        "position": position,
        "token_id": int(rng.integers(0, 50_000)),
        "text": f" token{position}",
        "phase": 0 if position < 4 else 1,
        "variant": "trained",
        "expert_ids": ids,
        "score_sum": scores[:, :k].sum(axis=1, dtype=np.float32),
        "mass": scores[:, :k].sum(axis=1, dtype=np.float32),
        "entropy": -(probabilities * np.log(probabilities)).sum(axis=1, dtype=np.float32),
        "margin": (scores[:, k - 1] - scores[:, k]).astype(np.float32),
        "runner_up": order[:, k].astype(np.int16),
        "weights": scores[:, :k].astype(np.float32),
        "scores": scores[:, :k].astype(np.float32),
        "logits": logits,
        "logprob": float(np.float32(-0.25 * (position % 7))) if position else None,
        "rank": 1 + position % 3 if position else None,
        "alternatives": ((position, float(np.float32(-0.1))), (7, float(np.float32(-2.5)))),
    }
    return Frame(**(fields | changes))


def record_trace(path: Path, frames: int = 300, **meta: Any) -> TraceMeta:
    """A finished trace of one lane, with a prompt event, on disk."""
    described = a_meta(**meta)
    sizes = {name: meta[name] for name in ("routers", "experts", "k") if name in meta}
    with TraceWriter(path, described) as writer:
        writer.event(TraceEvent("prompt", {"text": "Once", "ids": [1, 2]}))
        for position in range(frames):
            writer.append(a_frame(position, **sizes))
    return described


def same_bits(a: Any, b: Any) -> bool:
    """Arrays with the same dtype, shape and bytes, or both missing."""
    if a is None or b is None:
        return a is None and b is None
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def differences(a: Frame, b: Frame) -> list[str]:
    """The fields in which two frames differ in any bit."""
    found = []
    for name in Frame.__dataclass_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if name == "shadow":
            same = _same_shadow(left, right)
        elif isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
            same = same_bits(left, right)
        else:
            same = repr(left) == repr(right)  # NaN equals NaN, 0.0 is not -0.0
        if not same:
            found.append(name)
    return found


def _same_shadow(a: Any, b: Any) -> bool:
    if a is None or b is None or set(a) != set(b):
        return a is None and b is None
    fields = ("expert_ids", "weights", "score_sum")
    return all(same_bits(a[name].get(f), b[name].get(f)) for name in a for f in fields)


def readable(path: Path) -> list[Frame]:
    with TraceReader.open(path) as reader:
        assert reader.problems == []
        return list(reader.frames())
