"""Rows of the long form as frames, with every value of a stranger's checked.

A stranger's rows need only `position`, `token_id`, `layer` and `expert_ids`; what they lack stays
absent. Without a header of ours they are read twice, first to see which routers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.safety import LIMITS, single_line
from moescope.trace import checks
from moescope.trace.fields import ARRAYS, FLAGS
from moescope.trace.formats.longform import COLUMNS, REQUIRED, Row, read_header
from moescope.trace.formats.source import Source
from moescope.trace.frames import Frame, RecordLevel, RouterInfo, TraceMeta
from moescope.trace.metadata import classes_by_router_count, router_groups, trace_error

Site = Literal["mlp", "attention"]

RANGES = {
    "sequence": (0, 2**31 - 1),
    "lane": (0, 2**15 - 1),
    "position": (0, 2**31 - 1),
    "token_id": (-1, 2**31 - 1),
    "phase": (0, 1),
    "layer": (0, LIMITS.layers),
    "runner_up": (-1, LIMITS.experts - 1),
    "expert_ids": (-1, LIMITS.experts - 1),
}
LONGEST = {"expert_ids": 256, "weights": 256, "scores": 256, "logits": LIMITS.experts}
OPEN_FRAMES = 65_536  # incomplete at once: rows sorted by layer first would keep all of them
TEXT_LIMIT = 4096
FLOAT32_MAX = float(np.finfo(np.float32).max)
SITES: tuple[Site, ...] = ("mlp", "attention")


def check_row(row: Row, path: object, place: str) -> Row:
    """The row with every value in range. Raises `MoescopeError` (TRACE) naming place and column."""
    for name in REQUIRED:
        if row.get(name) is None:
            raise trace_error(path, f"{place}: {name}: expected a value, found none")
    for name, value in row.items():
        kind = COLUMNS[name]
        if value is None:
            continue
        good = _GOOD[kind](name, value)
        if not good:
            shown = single_line(repr(value), 60)
            raise trace_error(path, f"{place}: {name}: expected {_WORDS[kind]}, found {shown}")
    return row


def _whole(name: str, value: Any) -> bool:
    low, high = RANGES[name]
    return type(value) is int and low <= value <= high


def _wholes(name: str, value: Any) -> bool:
    return (
        type(value) is list and len(value) <= LONGEST[name] and all(_whole(name, v) for v in value)
    )


def _reals(name: str, value: Any) -> bool:
    return (
        type(value) is list and len(value) <= LONGEST[name] and all(_real(name, v) for v in value)
    )


def _real(_: str, value: Any) -> bool:
    # Beyond float32 is no number of ours; NaN and infinities are judged with their row.
    return type(value) in (float, int) and (abs(value) <= FLOAT32_MAX or not math.isfinite(value))


_GOOD: dict[str, Callable[[str, Any], bool]] = {
    "whole": _whole,
    "wholes": _wholes,
    "real": _real,
    "reals": _reals,
    "text": lambda name, value: (
        isinstance(value, str) and len(value) <= TEXT_LIMIT and (name != "site" or value in SITES)
    ),
}
_WORDS = {
    "whole": "a whole number in range",
    "wholes": "a list of whole numbers in range",
    "real": "a number",
    "reals": "a list of numbers",
    "text": "a text",
}
_Key = tuple[int, int, int]  # sequence, lane, position
_Router = tuple[int, str]  # layer, site
_Group = dict[_Router, int]  # the routers of one model, and where they are in its frames


@dataclass(slots=True)
class Survey:
    """What a first look at rows without a header finds: enough to describe the routers."""

    routers: dict[_Router, int] = field(default_factory=dict)  # largest expert id seen
    k: int = 0
    logits: int = 0
    columns: set[str] = field(default_factory=set)

    def meta(self) -> TraceMeta:
        record: RecordLevel = "ids"
        if "weights" in self.columns:
            record = "logits" if self.logits else "weights"
        own = {"token": "text", "phase": "phase", "variant": "variant", "runner_up": "runner_up"}
        own |= {name: name for name in ("score_sum", "mass", "entropy", "margin")}
        if "weights" in self.columns:
            del own["score_sum"]  # their sum, by definition
        routers = []
        for layer, site in sorted(self.routers):  # the order of execution is not told
            classes = self.logits or self.routers[layer, site] + 1
            routers.append(RouterInfo(layer, classes, 0, self.k, {}, site=SITES[site != "mlp"]))
        return TraceMeta(
            routers=tuple(routers),
            record=record,
            engine={"name": "import", "num_experts": "the largest id seen, plus 1"},
            weights_kind="applied" if "weights" in self.columns else "absent",
            absent=tuple(field for name, field in own.items() if name not in self.columns),
        )


def survey(rows: Iterable[Row]) -> Survey:
    """Look at every row once."""
    found = Survey()
    for row in rows:
        router = (row["layer"], row.get("site") or "mlp")
        ids = row["expert_ids"]
        largest = max(*ids, row.get("runner_up") or 0, 0) if ids else 0
        found.routers[router] = max(found.routers.get(router, 0), largest)
        found.k = max(found.k, len(ids))
        found.logits = max(found.logits, len(row.get("logits") or ()))
        found.columns.update(name for name, value in row.items() if value is not None)
    return found


def frames_of(
    rows: Iterable[Row], meta: TraceMeta, path: object, notes: list[str]
) -> Iterator[Frame]:
    """Frames in the order in which their last row came; what stayed incomplete comes last.

    Rows of a frame need not be adjacent. Missing routers hold no experts, and are counted in
    `notes`. Raises `MoescopeError` (TRACE) where a row names a router the meta does not have, or
    holds what no router can decide.
    """
    groups: list[_Group] = [
        {(router.layer, router.site): i for i, router in enumerate(routers)}
        for routers in router_groups(meta)
    ]
    classes = classes_by_router_count(meta)
    waiting: dict[_Key, dict[_Router, Row]] = {}
    missing = incomplete = 0

    def made(key: _Key, got: dict[_Router, Row]) -> Frame:
        nonlocal missing, incomplete
        group = _group(got, groups, path)
        missing += len(group) - len(got)
        incomplete += len(got) < len(group)
        frame = _frame(key, got, group)
        fault = _fault(frame, classes, meta.absent)
        if fault is not None:
            raise trace_error(path, f"position {key[2]} of lane {key[1]}: {fault}")
        return frame

    for row in rows:
        router = (row["layer"], row.get("site") or "mlp")
        key = (row.get("sequence") or 0, row.get("lane") or 0, row["position"])
        if router in waiting.get(key, {}):  # the same token again: a lane that was filled anew
            yield made(key, waiting.pop(key))
        got = waiting.setdefault(key, {})
        got[router] = row
        if len(got) == len(_group(got, groups, path)):
            yield made(key, waiting.pop(key))
        elif len(waiting) > OPEN_FRAMES:
            hint = "sort the rows by sequence, lane, position and layer"
            raise trace_error(path, f"rows of {OPEN_FRAMES:,} tokens lie apart", hint)
    for key, got in waiting.items():
        yield made(key, got)
    if incomplete:
        notes.append(f"{incomplete:,} tokens lack {missing:,} routers: those hold no experts")


def _fault(frame: Frame, classes: dict[int, Any], absent: tuple[str, ...]) -> str | None:
    """What `checks` say about one frame."""
    columns = {name: getattr(frame, name)[None] for name, *_ in ARRAYS if name not in FLAGS}
    more = {name: getattr(frame, name) for name in ("weights", "scores", "logits")}
    columns |= {name: array[None] for name, array in more.items() if array is not None}
    flags = sum(FLAGS[name] for name, array in more.items() if array is not None)
    width = 0 if frame.logits is None else frame.logits.shape[1]
    columns["shape"] = np.array([[*frame.expert_ids.shape, width]])
    columns["flags"] = np.array([flags])
    for name in list(columns)[:-2]:
        fault = checks.value_fault(name, columns[name], columns.__getitem__, classes, absent)
        if fault is not None:
            return fault
    return None


def _group(got: dict[_Router, Row], groups: list[_Group], path: object) -> _Group:
    """The routers of the model that these rows can be of."""
    for group in groups:
        if got.keys() <= group.keys():
            return group
    layer, site = next(reversed(got))
    raise trace_error(path, f"layer {layer} ({site}): expected a router of the trace")


def _frame(key: _Key, got: dict[_Router, Row], group: _Group) -> Frame:
    some = next(iter(got.values()))
    rows: list[Row] = [{}] * len(group)
    for router, row in got.items():
        rows[group[router]] = row
    k = max(len(row.get("expert_ids") or ()) for row in rows)
    classes = max(len(row.get("logits") or ()) for row in rows)
    floats: dict[str, Any] = {
        name: np.array([_or(row.get(name), np.nan) for row in rows], dtype=np.float32)
        for name in ("score_sum", "mass", "entropy", "margin")
    }
    weights = _all_or_none(rows, got, "weights", k)
    if weights is not None and all(row.get("score_sum") is None for row in got.values()):
        floats["score_sum"] = weights.sum(axis=1, dtype=np.float32)
    return Frame(
        sequence=key[0],
        lane=key[1],
        position=key[2],
        token_id=some["token_id"],
        text=some.get("token") or "",
        phase=some.get("phase") or 0,
        variant="trained" if some.get("variant") is None else some["variant"],
        expert_ids=_padded(rows, "expert_ids", k, np.int16, -1),
        weights=weights,
        scores=_all_or_none(rows, got, "scores", k),
        runner_up=np.array([_or(row.get("runner_up"), -1) for row in rows], dtype=np.int16),
        logits=_padded(rows, "logits", classes, np.float32, np.nan) if classes else None,
        **floats,
    )


def _or(value: Any, otherwise: float) -> Any:
    return otherwise if value is None else value


def _all_or_none(
    rows: list[Row], got: dict[_Router, Row], name: str, k: int
) -> NDArray[np.float32] | None:
    if any(row.get(name) is None for row in got.values()):
        return None
    return _padded(rows, name, k, np.float32, 0)


def _padded(rows: list[Row], name: str, width: int, dtype: Any, fill: float) -> NDArray[Any]:
    array = np.full((len(rows), width), fill, dtype=dtype)
    for i, row in enumerate(rows):
        values = row.get(name)
        if values is not None:
            array[i, : len(values)] = values[:width]
    return array


def source_of(header: Any | None, rows: Callable[[], Iterator[Row]], path: object) -> Source:
    """A `Source` from the header of a file (None: it has none) and a way to read its rows.

    Without a header the rows are read twice: first to see which routers there are.
    """
    if header is None:
        found = survey(rows())
        if not found.routers:
            raise trace_error(path, "rows: expected at least one, found none")
        source = Source(found.meta(), [], iter(()))
    else:
        source = read_header(header, path)
    source.frames = frames_of(rows(), source.meta, path, source.notes)
    return source
