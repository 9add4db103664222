"""Each of two lanes' gates on what the other's gate read: why both chose otherwise for one token.

Of four selections, those of A and B on their own inputs differ; the other two tell why:

- `gate`: B's router on A's input already chooses otherwise, A's on B's input does not;
- `input`: A's router on B's input chooses otherwise, B's on A's input does not: the input drifted;
- `either`: each of the two is enough;
- `together`: neither is, only both.

A flip that B's gate alone explains, and that A's logits undo, is blamed on a row of B's gate where
giving that row A's logit is enough. Where they do not, B chooses by another rule: another K, or
another bias. What routers read is kept by an intervention (`Watched`), so lanes under it take no
fused step, and on MLX no compiled one. Letters: L routers, E expert classes, K picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.lane import Lane, specs_of
from moescope.kernels import route
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import Frame, TraceEvent

UNKNOWN = ""

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Flip:
    """Why one router of B chose otherwise than A's. `rows` are (expert, |difference of its logit|)
    of B's gate, each of which turned the choice by itself; None: the gate's rows did not."""

    router: int
    cause: str
    rows: tuple[tuple[int, float], ...] | None = None


def cause(own_a: Any, b_on_a: Any, a_on_b: Any, own_b: Any) -> str:
    """From the experts [K] that A chose, B's router chooses on A's input, A's on B's, and B chose.
    `own_a` and `own_b` are different sets. -1 is no expert."""
    a, b = _set(own_a), _set(own_b)
    by_gate, by_input = _set(b_on_a) != a, _set(a_on_b) != a
    assert a != b, "no flip"
    if by_gate and by_input:
        return "either"
    if by_gate:
        return "gate"
    return "input" if by_input else "together"


def _set(ids: Any) -> frozenset[int]:
    return frozenset(int(expert) for expert in ids if expert >= 0)


def selected(
    logits: NDArray[np.float32], spec: RouterSpec, tensors: Sequence[Tensors]
) -> NDArray[np.int32]:
    """The experts [T, K] that `spec` chooses from rows of logits [T, E], each with its router's
    learned vectors."""

    def stacked(name: str, needed: bool) -> Any:
        return np.stack([held[name] for held in tensors]) if needed else None

    policy = spec.policy
    ids: NDArray[np.int32] = route(
        logits[:, : spec.E],
        spec,
        correction_bias=stacked("correction_bias", policy.correction_bias != "none"),
        per_expert_scale=stacked("per_expert_scale", policy.per_expert_scale),
    ).expert_ids
    return ids


def blamed_rows(
    chosen: Any,
    logits: NDArray[np.float32],
    original: NDArray[np.float32],
    spec: RouterSpec,
    tensors: Tensors,
) -> tuple[tuple[int, float], ...] | None:
    """The rows that turned a choice; None where A's logits do not undo it. `chosen` by A's gate;
    `logits` of B's gate and `original` ones of A's [E], both on A's input; `spec` and `tensors` are
    B's."""
    wanted = _set(chosen)
    if _set(selected(original[None], spec, [tensors])[0]) != wanted:
        return None
    now = _set(selected(logits[None], spec, [tensors])[0])
    found = []
    for expert in sorted(wanted ^ now):
        if not (expert < len(original) and np.isfinite(original[expert])):
            continue
        mended = logits.copy()
        mended[expert] = original[expert]
        if _set(selected(mended[None], spec, [tensors])[0]) == wanted:
            found.append((expert, abs(float(original[expert]) - float(logits[expert]))))
    return tuple(found)


@dataclass(slots=True, eq=False)
class Watched:
    """An intervention that changes nothing and keeps what every router read in the last call.
    `before` is the one it stands in front of."""

    before: Any = None
    routers: dict[int, Any] = field(default_factory=dict)  # running routers by index
    inputs: dict[tuple[int, int], tuple[int, Any]] = field(default_factory=dict)
    call: Any = None

    def __call__(self, router: Any, x: Any, routing: Any, call: Any) -> Any:
        if self.before is not None:
            routing = self.before(router, x, routing, call)
        self.routers[router.index], self.call = router, call
        for lane, start, rows in call.spans():
            self.inputs[lane, router.index] = start, x[rows]
        return routing

    def read(self, lane: int, router: int, position: int) -> Any:
        """What `router` read for one token [1, H]; None where the last call did not hold it."""
        start, x = self.inputs.get((lane, router), (0, ()))
        at = position - start
        return x[at : at + 1] if 0 <= at < len(x) else None

    def route(self, router: int, spec: RouterSpec, x: Any) -> Any:
        """The routing of one row under this model's gate, with its logits."""
        return self.routers[router].route(x, spec, self.call)


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """The gates of one lane: who watches them, the lane's number there, its resolved specs, and
    the learned vectors of its routers."""

    watched: Watched
    lane: int
    specs: Sequence[RouterSpec]
    tensors: Sequence[Tensors]


def flip_of(a: Gates, b: Gates, frames: tuple[Frame, Frame], router: int) -> Flip:
    """Why `router` chose otherwise for the one token of both frames; cause "" where nothing tells:
    an input that is no longer held, a router that looks ids up, inputs of other widths."""
    mine, theirs = frames
    read_a = a.watched.read(a.lane, router, mine.position)
    read_b = b.watched.read(b.lane, router, theirs.position)
    of_a, of_b = a.specs[router], b.specs[router]
    if read_a is None or read_b is None or read_a.shape != read_b.shape:
        return Flip(router, UNKNOWN)
    if of_a.wiring.hash_table or of_b.wiring.hash_table:
        return Flip(router, UNKNOWN)
    b_on_a = b.watched.route(router, of_b, _like(read_a, read_b))
    a_on_b = a.watched.route(router, of_a, _like(read_b, read_a))
    own = mine.expert_ids[router]
    selections = (b_on_a.expert_ids[0].tolist(), a_on_b.expert_ids[0].tolist())
    found = cause(own, *selections, theirs.expert_ids[router])
    if found not in ("gate", "either"):
        return Flip(router, found)
    original = a.watched.route(router, of_a, read_a)
    logits = [np.array(routing.logits[0].tolist(), np.float32) for routing in (b_on_a, original)]
    rows = blamed_rows(own, logits[0], logits[1], of_b, b.tensors[router])
    return Flip(router, found, rows)


def _like(x: Any, other: Any) -> Any:
    """One model's row where, and as what, the other's are."""
    return x.to(other.device, other.dtype) if hasattr(x, "to") else x.astype(other.dtype)


class Crossing:
    """The flips of lanes whose gates are not lane 0's own, as a session runs. Nothing is watched,
    and no step is slowed down, until lanes are fed the same tokens."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], tuple[Flip, ...]] = {}  # (lane, position), last step
        self._watched: dict[int, tuple[Any, Watched]] = {}  # by the id of an interpreter
        self._gates: dict[int, Gates] = {}
        self._key: object = None

    @property
    def active(self) -> bool:
        """Whether gates are crossed now."""
        return bool(self._gates)

    def prepare(self, lanes: Mapping[int, Lane], runner: Any, wanted: bool) -> None:
        """Watch what has to be watched for `lanes`; `runner` gives the interpreter of a lane and
        its number there."""
        key = (wanted, *((n, lane.expression, id(runner(n)[0])) for n, lane in lanes.items()))
        if key == self._key:
            return
        self._key = key
        self.close()
        if not wanted or 0 not in lanes:
            return
        others = [n for n in lanes if n and _differ(lanes[0], lanes[n])]
        of = {n: runner(n) for n in (0, *others)}
        if not others or not all(hasattr(one, "set_intervention") for one, _ in of.values()):
            return
        for n, (interpreter, number) in of.items():
            watched = self._watch(interpreter)
            lane = lanes[n]
            specs = specs_of(interpreter.routers, lane.policies, interpreter.dtype)
            tensors = [router.tensors for router in interpreter.routers]
            self._gates[n] = Gates(watched, number, specs, tensors)

    def _watch(self, interpreter: Any) -> Watched:
        if id(interpreter) not in self._watched:
            watched = Watched(before=interpreter.intervene)
            interpreter.set_intervention(watched)
            self._watched[id(interpreter)] = interpreter, watched
        return self._watched[id(interpreter)][1]

    def take(self, frames: Sequence[Frame], alike: Any) -> list[TraceEvent]:
        """The flips of a step's frames, as events of kind `flips`, one a lane and token. `alike`
        tells whether a lane was fed lane 0's ids throughout."""
        self.found = {}
        if not self._gates:
            return []
        first = {frame.position: frame for frame in frames if frame.lane == 0}
        events = []
        for frame in frames:
            mine = first.get(frame.position)
            if mine is None or frame.lane not in self._gates or not frame.lane:
                continue
            if not alike(frame.lane):
                continue
            flips = self._flips(mine, frame)
            if flips:
                self.found[frame.lane, frame.position] = flips
                told = [[flip.router, flip.cause, _plain(flip.rows)] for flip in flips]
                data = {"sequence": frame.sequence, "against": 0, "flips": told}
                events.append(TraceEvent("flips", data, frame.lane, frame.position))
        return events

    def _flips(self, a: Frame, b: Frame) -> tuple[Flip, ...]:
        gates = self._gates[0], self._gates[b.lane]
        pairs = enumerate(zip(a.expert_ids, b.expert_ids, strict=True))
        chosen = ((router, _set(mine), _set(theirs)) for router, (mine, theirs) in pairs)
        return tuple(
            flip_of(*gates, (a, b), router)
            for router, mine, theirs in chosen
            if mine and theirs and mine != theirs
        )

    def close(self) -> None:
        """Watch nothing any more."""
        for interpreter, watched in self._watched.values():
            if interpreter.intervene is watched:
                interpreter.set_intervention(watched.before)
        self._watched, self._gates, self.found = {}, {}, {}


def _differ(first: Lane, lane: Lane) -> bool:
    """Whether two lanes have other gates, and nothing but gates and inputs decides in both."""
    from moescope.variants import parse
    from moescope.variants.steering import split

    for expression in (first.expression, lane.expression):
        variant, steered = split(expression)
        if steered or parse(variant).rebuilds:
            return False
    bits = [{policy.gate_quant_bits for policy in held.policies} for held in (first, lane)]
    return first.model != lane.model or bits[0] != bits[1]


def _plain(rows: tuple[tuple[int, float], ...] | None) -> list[list[float]] | None:
    return None if rows is None else [[expert, round(error, 6)] for expert, error in rows]
