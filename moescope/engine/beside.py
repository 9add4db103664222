"""A second checkpoint beside the first: an original and its quantised copy, a base and one tuned of
it. Lanes of either run in one session, so that whatever shows lanes shows two models.

Both must have the same vocabulary, and routers in the same layers over as many experts. Token ids
are those of the first model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.outputs import in_order, merged
from moescope.engine.rewired_lanes import rewirable
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from moescope.safety import single_line
from moescope.trace.frames import RecordLevel, TraceMeta


@dataclass(frozen=True, slots=True, eq=False)
class TwoModels:
    """Two `LoadedModel`s as one: what a session and a recorder ask of a model is the first's."""

    first: Any
    second: Any
    interpreter: Beside
    facts: dict[str, Any]

    @property
    def checkpoint(self) -> Any:
        return getattr(self.first, "checkpoint", None)


def beside(first: Any, second: Any) -> TwoModels:
    """Both models as one. Raises `MoescopeError` for two that do not correspond."""
    correspond(outline(first), outline(second))
    name = str(second.facts.get("name", ""))
    contexts = [model.facts.get("context") for model in (first, second)]
    known = [context for context in contexts if context]
    facts = {**first.facts, "beside": single_line(name, 80), "context": min(known, default=None)}
    for size in ("weights_bytes", "cache_bytes"):
        facts[size] = sum(int(model.facts.get(size) or 0) for model in (first, second))
    facts["router_twin"] = ""
    own = f"{single_line(name, 80)}: "
    notes = [own + note for note in second.facts.get("notes", ())]
    facts["notes"] = [*first.facts.get("notes", ()), *notes]
    return TwoModels(first, second, Beside(first.interpreter, second.interpreter), facts)


@dataclass(frozen=True, slots=True)
class Outline:
    """What must be alike in two models. `routers`: the layer of each, and its expert classes."""

    name: str
    vocabulary: int
    routers: tuple[tuple[int, int], ...]


def outline(model: Any) -> Outline:
    """Of a `LoadedModel`."""
    interpreter = model.interpreter
    return Outline(
        str(model.facts.get("name", "")),
        interpreter.vocab_size,
        tuple((router.layer, router.spec.E) for router in interpreter.routers),
    )


def correspond(first: Outline, second: Outline) -> None:
    """Refuse models whose routers or vocabularies do not correspond."""
    pairs = [("vocabulary", first.vocabulary, second.vocabulary)]
    pairs.append(("routers", len(first.routers), len(second.routers)))
    for one, other in zip(first.routers, second.routers, strict=False):
        pairs.append((f"layer {one[0]}: router's layer", one[0], other[0]))
        pairs.append((f"layer {one[0]}: experts", one[1], other[1]))
    for what, expected, found in pairs:
        if expected != found:
            a, b = (single_line(model.name, 80) for model in (first, second))
            raise MoescopeError(
                f"{b}: {what}: expected {expected} as in {a}, found {found}",
                hint="two checkpoints of one architecture",
            )


def unlike_ids(first: Any, second: Any, vocabulary: int) -> dict[int, tuple[str, str]]:
    """The ids that stand for another text in the second tokenizer, and both texts. Where one model
    has none, the other's is taken on trust."""
    if first is None or second is None:
        return {}
    hashes = {getattr(tokenizer, "hash", None) for tokenizer in (first, second)}
    if len(hashes) == 1 and None not in hashes:
        return {}
    pieces = ((i, (first.piece(i), second.piece(i))) for i in range(vocabulary))
    return {i: (one, other) for i, (one, other) in pieces if one != other}


def refuse_unlike(unlike: Mapping[int, tuple[str, str]], ids: Iterable[int]) -> None:
    """Refuse ids that the two models read as different text, naming the first."""
    for at, token in enumerate(ids):
        if token in unlike:
            one, other = (repr(single_line(piece, 40)) for piece in unlike[token])
            raise MoescopeError(
                f"tokenizers differ at token {at}: id {token} is {one} here and {other} in the "
                "other model",
                hint="checkpoints with one tokenizer, or --prompt-ids",
            )


def meta_of_both(a: TraceMeta, b: TraceMeta) -> TraceMeta:
    """One trace of two models: the second's routers and tensors after the first's."""
    count = len(a.routers)
    moved = {index + count: tensors for index, tensors in b.router_tensors.items()}
    return replace(
        a,
        models=(*a.models[:1], *b.models[:1]),
        routers=(*a.routers, *(replace(router, model=1) for router in b.routers)),
        router_tensors={**a.router_tensors, **moved},
        engine={**a.engine, "second": b.engine},
    )


class Beside:
    """An `Interpreter` over two that correspond. A lane is of the first until it is `place`d; each
    model holds its own lanes only, under numbers of its own."""

    draws = False
    twin = ""

    def __init__(self, first: Any, second: Any) -> None:
        self.unlike: dict[int, tuple[str, str]] = {}  # ids that the two read as different text
        self.models = [first, second]
        self.routers, self.vocab_size = first.routers, first.vocab_size
        self.device, self.dtype = first.device, first.dtype
        self.kernels = dict(first.kernels)
        self._places: dict[int, tuple[int, int]] = {}  # lane -> (model, number there)
        self._capacity = 0

    # --- who runs a lane

    def place(self, lane: int, model: int) -> None:
        """Make `lane`, which holds nothing then, one of `model`: 0 or 1."""
        held = self._places.get(lane)
        if held is None or held[0] != model:
            same = self.models[0] is self.models[1]
            taken = {n for m, n in self._places.values() if m == model or same}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            self._places[lane] = model, number
            self.models[model].open(number + 1, self._capacity)
        self.truncate(lane, 0)

    def runner(self, lane: int) -> tuple[Any, int]:
        """The interpreter of a lane, and the lane's number there."""
        if lane not in self._places:
            self.place(lane, 0)
        model, number = self._places[lane]
        return self.models[model], number

    def model_of(self, lane: int) -> int:
        return self._places.get(lane, (0, 0))[0]

    # --- as one interpreter

    def open(self, lanes: int, capacity: int) -> None:
        self._capacity = max(capacity, self._capacity)
        for lane in range(lanes):
            self.runner(lane)
        for which, interpreter in enumerate(self.models):
            held = [number for model, number in self._places.values() if model == which]
            interpreter.open(max(held, default=0) + 1, self._capacity)

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        interpreter, number = self.runner(lane)
        interpreter.set_policies(number, policies)

    def set_wiring(self, lane: int, expression: str) -> None:
        """See `RewiredLanes.set_wiring`."""
        interpreter, number = self.runner(lane)
        wrapped = rewirable(interpreter, expression)
        if wrapped is not interpreter:
            self.models = [wrapped if one is interpreter else one for one in self.models]
        if hasattr(wrapped, "set_wiring"):
            wrapped.set_wiring(number, expression)

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        if policies:
            raise MoescopeError("shadow variants: expected one model, found two")

    def length(self, lane: int) -> int:
        interpreter, number = self.runner(lane)
        return int(interpreter.length(number))

    def truncate(self, lane: int, length: int) -> None:
        interpreter, number = self.runner(lane)
        interpreter.truncate(number, length)

    def copy(self, source: int, target: int, length: int) -> None:
        ours, here = self.runner(source)
        theirs, there = self.runner(target)
        assert ours is theirs, "a lane forks within its model"
        ours.copy(here, there, length)

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        return max(int(one.cache_bytes(lanes, capacity)) for one in self.models)

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """See `Interpreter.run`: the lanes of one model together, put in order again."""
        groups: dict[int, list[int]] = {}
        for row, lane in enumerate(lanes):
            self.runner(lane)
            groups.setdefault(self._places[lane][0], []).append(row)
        outs = []
        for model, rows in sorted(groups.items()):
            numbers = [self._places[lanes[row]][1] for row in rows]
            some = token_ids[rows]
            out = self.models[model].run(numbers, some, all_logits=all_logits, record=record)
            outs.append(replace(out, expected=None, kept=None))
        order = [row for _, rows in sorted(groups.items()) for row in rows]
        return in_order(outs[0] if len(outs) == 1 else merged(outs), order)
