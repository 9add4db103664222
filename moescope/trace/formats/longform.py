"""The long form: one row per token, lane and router. Its columns, its header,
and frames as rows.

CSV, JSONL and Parquet hold the same rows and the same header (meta, tensors and events as one JSON
object); their files are beside this one. Rows become frames again in `assemble.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from moescope.trace.columns import pack
from moescope.trace.formats.source import Source
from moescope.trace.frames import Frame, RouterInfo, TraceMeta
from moescope.trace.metadata import (
    event_from_json,
    event_to_json,
    from_json,
    router_groups,
    to_json,
    trace_error,
    unpack_tensors,
)

Row = dict[str, Any]  # the columns of one row that are there; lists for lists

# column, kind: whole, text, real, wholes, reals
COLUMNS: dict[str, str] = {
    "sequence": "whole",
    "lane": "whole",
    "position": "whole",
    "token_id": "whole",
    "token": "text",
    "phase": "whole",
    "variant": "text",
    "layer": "whole",
    "site": "text",
    "expert_ids": "wholes",
    "weights": "reals",
    "scores": "reals",
    "score_sum": "real",
    "mass": "real",
    "entropy": "real",
    "margin": "real",
    "runner_up": "whole",
    "logits": "reals",
}
REQUIRED = ("position", "token_id", "layer", "expert_ids")


def columns_of(meta: TraceMeta) -> list[str]:
    """The columns a trace has in the long form."""
    if meta.record == "logits":
        return list(COLUMNS)
    left_out = {"ids": ("weights", "scores", "logits"), "weights": ("logits",)}[meta.record]
    return [name for name in COLUMNS if name not in left_out]


def header_of(source: Source) -> dict[str, Any]:
    """Everything beside the rows, as one JSON object."""
    tensors = {
        str(router): {name: base64.b64encode(pack(a)).decode() for name, a in arrays.items()}
        for router, arrays in source.meta.router_tensors.items()
    }
    events = [{"kind": event.kind, **event_to_json(event, at)} for event, at in source.events]
    return {"meta": to_json(source.meta), "router_tensors": tensors, "events": events}


def read_header(data: Any, path: object) -> Source:
    """A `Source` without frames from the object that `header_of` makes, each value checked."""
    if not isinstance(data, dict):
        raise trace_error(path, "moescope_meta: expected an object")
    meta = from_json(data.get("meta"), path)
    events, tensors = data.get("events", []), data.get("router_tensors", {})
    if not isinstance(events, list) or not isinstance(tensors, dict):
        raise trace_error(path, "moescope_meta: expected events and router_tensors")
    placed = []
    for event in events:
        kind = event.get("kind") if isinstance(event, dict) else None
        if not isinstance(kind, str):
            raise trace_error(path, "moescope_meta: events: expected a kind")
        placed.append(event_from_json(kind, event, path))
    meta.router_tensors.update(unpack_tensors(_packed(tensors, path), path))
    return Source(meta, placed, iter(()))


def _packed(tensors: dict[str, Any], path: object) -> Iterator[tuple[str, str, bytes]]:
    try:
        for router, arrays in tensors.items():
            for name, text in arrays.items():
                yield router, name, base64.b64decode(text, validate=True)
    except (ValueError, AttributeError, TypeError) as error:
        raise trace_error(path, "moescope_meta: router_tensors: expected arrays") from error


# --- frames to rows -------------------------------------------------------------------------------


def rows_of(source: Source) -> Iterator[Row]:
    """One row a router, in the order of frames; NaN and -1 as they are, None where absent."""
    groups = list(router_groups(source.meta))
    for frame in source.frames:
        routers = _routers_of(frame, groups)
        for r, router in enumerate(routers):
            yield {
                "sequence": frame.sequence,
                "lane": frame.lane,
                "position": frame.position,
                "token_id": frame.token_id,
                "token": frame.text,
                "phase": frame.phase,
                "variant": frame.variant,
                "layer": router.layer,
                "site": router.site,
                "expert_ids": frame.expert_ids[r],
                "weights": None if frame.weights is None else frame.weights[r],
                "scores": None if frame.scores is None else frame.scores[r],
                "score_sum": frame.score_sum[r],
                "mass": frame.mass[r],
                "entropy": frame.entropy[r],
                "margin": frame.margin[r],
                "runner_up": int(frame.runner_up[r]),
                "logits": None if frame.logits is None else frame.logits[r],
            }


def _routers_of(frame: Frame, groups: list[tuple[RouterInfo, ...]]) -> tuple[RouterInfo, ...]:
    count = frame.expert_ids.shape[0]
    for routers in groups:
        if len(routers) == count:
            return routers
    return tuple(RouterInfo(r, 1, 0, 0, {}) for r in range(count))
