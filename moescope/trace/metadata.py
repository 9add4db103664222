"""`TraceMeta` and `TraceEvent` as JSON and back, with every value of a stranger's checked.

Formats use `to_json` and `from_json` alike; the store keeps `router_tensors` beside the JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, single_line
from moescope.trace.columns import COLUMN_BYTES, ColumnError, unpack
from moescope.trace.fields import ARRAYS
from moescope.trace.frames import RouterInfo, TraceEvent, TraceMeta

VERSION = 1
TENSOR_BYTES = 256 << 20  # all learned vectors of all routers, expanded
MAX_ROUTERS = 2 * LIMITS.layers
CHOICES: dict[str, tuple[str, ...]] = {
    "record": ("ids", "weights", "logits"),
    "ids_space": ("logical", "physical"),
    "weights_kind": ("applied", "selection", "absent"),
    "site": ("mlp", "attention"),
    "kind": ("learned", "hash"),
}
ABSENT = frozenset(name for name, *_ in ARRAYS) | {
    "token_id",
    "text",
    "logprob",
    "alternatives",
    "phase",
    "variant",
}


def trace_error(path: object, message: str, hint: str = "") -> MoescopeError:
    """The error for a bad trace: `<file>: <message>`."""
    return MoescopeError(f"{single_line(str(path))}: {message}", hint=hint, code=ExitCode.TRACE)


def nothing_readable(path: object, problems: Sequence[str]) -> MoescopeError:
    """The error for a trace of which damage left no frame."""
    return trace_error(path, f"nothing in it can be read: {problems[0]}")


def to_json(meta: TraceMeta) -> dict[str, Any]:
    """Everything of a `TraceMeta` but its tensors, as JSON values."""
    routers = [
        {name: getattr(router, name) for name in RouterInfo.__dataclass_fields__}
        for router in meta.routers
    ]
    names = set(TraceMeta.__dataclass_fields__) - {"routers", "router_tensors"}
    plain = {name: _plain(getattr(meta, name)) for name in sorted(names)}
    return {"version": VERSION, **plain, "routers": routers}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Fields:
    """Takes checked values out of a JSON object; the errors name the file and the field."""

    def __init__(self, data: Any, path: object, prefix: str) -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(data, dict):
            raise trace_error(path, f"{prefix}: expected an object, found {_short(data)}")
        self.data: dict[str, Any] = data

    def take(self, name: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.data.get(name, default)
        if not fits(value):
            where = f"{self.prefix}.{name}"
            raise trace_error(self.path, f"{where}: expected {expected}, found {_short(value)}")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        expected = f"a whole number from {low:,} to {high:,}"
        fits = lambda v: type(v) is int and low <= v <= high  # noqa: E731
        return int(self.take(name, default, expected, fits))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.take(name, default, "true or false", lambda v: isinstance(v, bool)))

    def choice(self, name: str, default: str) -> Any:
        choices = CHOICES[name]
        return self.take(name, default, " or ".join(choices), lambda v: v in choices)

    def object(self, name: str) -> dict[str, Any]:
        return dict(self.take(name, {}, "an object", lambda v: isinstance(v, dict)))

    def list(self, name: str, limit: int, kind: type) -> tuple[Any, ...]:
        def fits(value: Any) -> bool:
            return (
                isinstance(value, list)
                and len(value) <= limit
                and all(type(item) is kind for item in value)
            )

        return tuple(self.take(name, [], f"a list of at most {limit:,} {kind.__name__}", fits))


def _short(value: Any) -> str:
    return single_line(repr(value), 80)


def from_json(data: Any, path: object) -> TraceMeta:
    """A `TraceMeta` (without tensors) from JSON values of a stranger.

    Raises `MoescopeError` (TRACE) naming `path` and the field that is wrong.
    """
    fields = _Fields(data, path, "meta")
    version = fields.integer("version", 1, 2**31, VERSION)
    if version > VERSION:
        raise trace_error(
            path,
            f"meta.version: expected {VERSION}, found {version}",
            "read it with the version of moescope that wrote it, or a newer one",
        )
    prompt_ids = None
    if fields.data.get("prompt_ids") is not None:
        prompt_ids = fields.list("prompt_ids", LIMITS.encode_chars, int)
    absent = fields.list("absent", len(ABSENT), str)
    if not set(absent) <= ABSENT:
        raise trace_error(path, f"meta.absent: expected fields of a frame, found {_short(absent)}")
    routers = fields.list("routers", MAX_ROUTERS, dict)
    return TraceMeta(
        models=fields.list("models", 8, dict),
        routers=tuple(_router(r, path, i) for i, r in enumerate(routers)),
        record=fields.choice("record", "weights"),
        engine=fields.object("engine"),
        rank_ordered=fields.flag("rank_ordered", True),
        ids_space=fields.choice("ids_space", "logical"),
        weights_kind=fields.choice("weights_kind", "applied"),
        last_token_present=fields.flag("last_token_present", True),
        sampling=fields.object("sampling"),
        prompt_ids=prompt_ids,
        redacted=fields.flag("redacted", False),
        absent=absent,
    )


def _router(data: Any, path: object, index: int) -> RouterInfo:
    fields = _Fields(data, path, f"meta.routers[{index}]")
    return RouterInfo(
        layer=fields.integer("layer", 0, LIMITS.layers),
        num_experts=fields.integer("num_experts", 1, LIMITS.experts),
        num_null_experts=fields.integer("num_null_experts", 0, LIMITS.experts, 0),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 0, LIMITS.experts),
        spec=fields.object("spec"),
        model=fields.integer("model", 0, 8, 0),
        site=fields.choice("site", "mlp"),
        kind=fields.choice("kind", "learned"),
    )


def event_to_json(event: TraceEvent, at: int) -> dict[str, Any]:
    """An event as JSON values; `at` is the number of frames appended before it."""
    return {"lane": event.lane, "position": event.position, "at": at, "data": event.data}


def event_from_json(kind: str, data: Any, path: object) -> tuple[TraceEvent, int]:
    """An event and the number of frames before it. Raises `MoescopeError` (TRACE)."""
    fields = _Fields(data, path, "event")
    event = TraceEvent(
        kind=kind,
        data=fields.object("data"),
        lane=fields.integer("lane", 0, 2**15 - 1, 0),
        position=fields.integer("position", -(2**31), 2**31 - 1, 0),
    )
    return event, fields.integer("at", 0, 2**62, 0)


def unpack_tensors(
    packed: Iterable[tuple[str, str, bytes]], path: object
) -> dict[int, dict[str, NDArray[Any]]]:
    """`router_tensors` from (router, name, packed array), as far as memory should go."""
    tensors: dict[int, dict[str, NDArray[Any]]] = {}
    left = TENSOR_BYTES
    for router, name, blob in packed:
        if not (router.isascii() and router.isdigit() and len(router) < 6):
            raise trace_error(path, f"router_tensors: expected a router, found {_short(router)}")
        try:
            array = unpack(blob, min(left, COLUMN_BYTES))
        except ColumnError as error:
            raise trace_error(path, f"router_tensors: {_short(name)} {error}") from error
        left -= array.nbytes
        tensors.setdefault(int(router), {})[name] = array
    return tensors


def classes_by_router_count(meta: TraceMeta) -> dict[int, NDArray[np.int64]]:
    """How many expert classes each router of a frame has, by the number of routers in the frame.

    A frame of a comparison of two models has the routers of its own model; where both have as many,
    the larger number counts.
    """
    groups: dict[int, Any] = {}
    for routers in router_groups(meta):
        classes = np.array([r.num_experts + r.num_null_experts for r in routers], dtype=np.int64)
        known = groups.get(len(classes))
        groups[len(classes)] = classes if known is None else np.maximum(known, classes)
    return groups


def router_groups(meta: TraceMeta) -> Iterable[tuple[RouterInfo, ...]]:
    """The routers of each model, one tuple a model."""
    models = dict.fromkeys(router.model for router in meta.routers)
    return [tuple(r for r in meta.routers if r.model == model) for model in models]


def redact_event(event: TraceEvent) -> TraceEvent | None:
    """The event without anything that tells text or token ids; None where nothing would be left."""
    if event.kind in ("prompt", "pieces"):
        return None
    telling = {"text", "prompt", "prompt_ids", "messages", "ids", "token_ids", "pieces", "content"}
    kept = {key: value for key, value in event.data.items() if key not in telling}
    return TraceEvent(event.kind, kept, event.lane, event.position)
