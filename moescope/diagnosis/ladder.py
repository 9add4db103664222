"""The replay ladder: one lane's routing forced into another, rung by rung, on the same tokens.

B runs four times: as it routes itself; executing the experts A chose, with the weights B gives
them; the same in A's order; and with A's weights too. What a rung takes off the distance between
what A and B expect next is that part of the routing; what is left on the last rung is something
else (weights, kernels, dtypes). Torch only. Letters: T tokens of a chunk, L routers, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.compare import plain
from moescope.diagnosis.forced import CHUNK, LOGITS_BYTES, able, put_under
from moescope.diagnosis.two_models import Side, check_pair
from moescope.diagnosis.weighed import weights_at
from moescope.engine.prompts import check_ids
from moescope.engine.sampling import Expectation, divergence, expectations
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.measures import overlap

RUNGS = ("own routing", "ids", "ids and order", "ids and weights")


@dataclass(frozen=True, slots=True)
class Rung:
    """How far B is from A with this much of A's routing. KL(A ‖ B) in nats of the next token;
    Δlogp of the tokens that were fed; k3 is the estimate r − 1 − ln r of KL with r = p_A / p_B on
    those tokens (Schulman). None where nothing was finite."""

    name: str
    kl_mean: float | None
    kl_max: float | None
    logprob_mean: float | None  # mean |Δlogp|
    logprob_max: float | None
    k3_mean: float | None
    top1_agrees: float | None
    same_experts: float | None  # share of decisions that B itself would have made as A did


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs in the order of RUNGS."""

    lane_a: str
    lane_b: str
    tokens: int
    rungs: tuple[Rung, ...]

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = plain(self)
        return document

    @property
    def shares(self) -> dict[str, float] | None:
        """Of the mean KL: what the choice of experts, their order, their weights, and the rest
        make. None where A and B expect the same anyway."""
        kl = [rung.kl_mean for rung in self.rungs]
        known = [value for value in kl if value is not None]
        if len(known) < len(kl) or not known[0] > 1e-9:
            return None
        steps = [a - b for a, b in pairwise(known)]
        names = ("experts", "order", "weights", "rest")
        return dict(zip(names, (step / known[0] for step in (*steps, known[-1])), strict=True))


def climb(a: Side, b: Side, ids: Sequence[int]) -> Ladder:
    """Feed `ids` to A and, on every rung, to B. Both may be lanes of one loaded model.

    Raises `MoescopeError`: RESOURCES where B's interpreter cannot be forced, USAGE for models whose
    routers do not correspond.
    """
    check_pair(a, b)
    shared = a.model.interpreter is b.model.interpreter
    ours = able(a.model.interpreter, a.variant, *([b.variant] if shared else []))
    theirs = ours if shared else able(b.model.interpreter, b.variant)
    if not hasattr(theirs, "set_intervention"):
        raise MoescopeError(
            "replaying routing needs the torch interpreter",
            hint="--device cpu or cuda",
            code=ExitCode.RESOURCES,
        )
    check_ids(ids, ours.vocab_size, int(a.model.facts.get("context") or len(ids)))
    first = 1 if shared else 0
    lanes = [first + n for n in range(len(RUNGS))]
    _open(ours, a.variant, [0], len(ids))
    _open(theirs, b.variant, lanes, len(ids))
    replay = _Replay(dict(zip(lanes, RUNGS, strict=True)), before=theirs.intervene)
    sums = [_Sums() for _ in RUNGS]
    theirs.set_intervention(replay)
    try:
        room = max(1, min(CHUNK, LOGITS_BYTES // (4 * ours.vocab_size)))
        for start in range(0, len(ids), room):
            row = np.array([ids[start : start + room]], np.int64)
            given = ours.run([0], row, all_logits=True)
            replay.given = given.expert_ids[0], given.weights[0]
            expected = expectations(given.logits[0])
            following = [*row[0, 1:].tolist(), *ids[start + room : start + room + 1]]
            for lane, total in zip(lanes, sums, strict=True):
                replay.own = {}
                out = theirs.run([lane], row, all_logits=True)
                total.add(expected, expectations(out.logits[0]), following)
                total.decide(given.expert_ids[0], replay.own)
    finally:
        theirs.set_intervention(replay.before)
    rungs = tuple(total.rung(name) for name, total in zip(RUNGS, sums, strict=True))
    return Ladder(_title(a, b, a), _title(a, b, b), len(ids), rungs)


def _open(interpreter: Any, variant: str, lanes: Sequence[int], tokens: int) -> None:
    interpreter.open(max(lanes) + 1, tokens)
    for lane in lanes:
        interpreter.truncate(lane, 0)
        put_under(interpreter, lane, variant)


def _title(a: Side, b: Side, one: Side) -> str:
    return one.variant if a.model is b.model else f"{one.name} {one.variant}"


class _Replay:
    """Executes A's decisions in the lanes of the rungs, and keeps what B decided by itself."""

    def __init__(self, rungs: dict[int, str], before: Any) -> None:
        self.rungs, self.before = rungs, before
        self.given: tuple[NDArray[Any], NDArray[Any]] | None = None  # [T, L, K] of this chunk
        self.own: dict[int, NDArray[Any]] = {}  # router -> ids [T, K]

    def __call__(self, router: Any, x: Any, routing: Any, call: Any) -> Any:
        if self.before is not None:
            routing = self.before(router, x, routing, call)
        rung = self.rungs.get(call.lanes[0])
        if rung is None:
            return routing
        self.own[router.index] = routing.expert_ids.cpu().numpy()
        assert self.given is not None
        ids = self.given[0][:, router.index].astype(np.int64)
        if rung == "own routing" or not (ids >= 0).any():
            return routing
        if rung == "ids and weights":
            weights = self.given[1][:, router.index].astype(np.float64)
        else:
            tensors = _vectors(router)
            logits = routing.logits.float().cpu().numpy()
            spec, _ = call.groups[router.index][0]  # one lane, so one spec
            weights = weights_at(logits, ids, spec, tensors)
            if rung == "ids":
                ids, weights = _as_b_ranks(ids, weights)
        return forced_routing(routing, ids, weights)


def _as_b_ranks(ids: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same experts by B's weights, largest first; unused slots last."""
    order = np.lexsort((ids, np.where(ids >= 0, -weights, np.inf)))
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def _vectors(router: Any) -> dict[str, NDArray[Any]]:
    names = ("correction_bias", "per_expert_scale")
    held = {name: getattr(router, name, None) for name in names}
    return {name: t.float().cpu().numpy() for name, t in held.items() if t is not None}


def forced_routing(routing: Any, ids: NDArray[Any], weights: NDArray[Any]) -> Any:
    """A routing that executes these experts [R, K] with these weights; -1 is no expert."""
    import torch

    device = routing.expert_ids.device
    executed = torch.from_numpy(np.where(ids >= 0, weights, 0.0).astype(np.float32)).to(device)
    return replace(
        routing,
        expert_ids=torch.from_numpy(ids.astype(np.int32)).to(device),
        weights=executed,
        scores=torch.full_like(executed, math.nan),
        score_sum=executed.sum(-1),
    )


@dataclass(slots=True, eq=False)
class _Sums:
    """What one rung adds up over tokens."""

    kl: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)  # |Δlogp|
    k3: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)
    same: int = 0
    decisions: int = 0

    def add(
        self,
        a: Sequence[Expectation | None],
        b: Sequence[Expectation | None],
        following: Sequence[int],
    ) -> None:
        for at, (one, other) in enumerate(zip(a, b, strict=True)):
            if one is None or other is None:
                continue
            self.kl.append(divergence(one, other))
            self.top1.append(one.likeliest_id() == other.likeliest_id())
            if at < len(following):
                log_ratio = one.logprob(following[at]) - other.logprob(following[at])
                self.apart.append(abs(log_ratio))
                self.k3.append(math.expm1(min(log_ratio, 700.0)) - log_ratio)

    def decide(self, given: NDArray[Any], own: dict[int, NDArray[Any]]) -> None:
        """A's ids [T, L, K] against what B chose by itself."""
        for router, ids in own.items():
            theirs = given[:, router]
            common = overlap(theirs, ids)
            counts = (theirs >= 0).sum(1)
            self.same += int(((common == counts) & (counts == (ids >= 0).sum(1))).sum())
            self.decisions += len(ids)

    def rung(self, name: str) -> Rung:
        def mean(values: Sequence[float]) -> float | None:
            finite = [value for value in values if math.isfinite(value)]
            return sum(finite) / len(finite) if finite else None

        return Rung(
            name=name,
            kl_mean=mean(self.kl),
            kl_max=max(self.kl, default=None),
            logprob_mean=mean(self.apart),
            logprob_max=max(self.apart, default=None),
            k3_mean=mean(self.k3),
            top1_agrees=mean(self.top1),
            same_experts=self.same / self.decisions if self.decisions else None,
        )
