"""The routers of a trace as specs, and what each decided: as generated, or under a variant on the
same logits. Pure functions over arrays; panels are made of these in `view.py`.

Letters: L routers, E expert classes (null experts included), K picked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.safety import printable
from moescope.trace.frames import TraceMeta
from moescope.trace.measures import UNIT, sum_violations
from moescope.trace.metadata import router_groups
from moescope.ui.history import Lane

TRAINED = "trained"
NEAR_TIE = 0.01  # ranks K and K+1 within 1 %: a tie under another dtype or kernel


GENERATED = "as generated"  # the basis of what really ran


@dataclass(frozen=True, slots=True, eq=False)
class RouterTable:
    """What is fixed about the routers of a model. `respecs` remembers specs under a variant."""

    specs: tuple[RouterSpec, ...]  # as trained
    labels: tuple[str, ...]  # "00", "17", "17a" for a router of attention
    layers: tuple[int, ...]
    num_experts: NDArray[np.int16]  # [L] classes, null experts included
    top_k: NDArray[np.int16]  # [L]
    allowed: tuple[float | tuple[float, float] | None, ...]  # what the sums may be, as trained
    tensors: dict[int, dict[str, NDArray[np.float32]]]
    dtype: str
    model: str = ""  # its name, where a trace holds several
    respecs: dict[str, tuple[RouterSpec, ...]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.specs)

    @property
    def widest(self) -> int:
        return int(self.num_experts.max(initial=1))


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What L routers decided for one token. None: not recorded."""

    expert_ids: NDArray[np.int16]  # [L, K], -1 unused
    weights: NDArray[np.float32] | None  # [L, K]
    scores: NDArray[np.float32] | None  # [L, K]
    score_sum: NDArray[np.float32]  # [L]
    mass: NDArray[np.float32]  # [L]
    entropy: NDArray[np.float32]  # [L] nats
    margin: NDArray[np.float32]  # [L]
    runner_up: NDArray[np.int16]  # [L]
    in_scores: NDArray[np.bool_]  # [L] margins are of scores, not of logits
    basis: str  # "as generated" or "on the same logits: <variant>"


def tables_of(meta: TraceMeta) -> tuple[RouterTable, ...]:
    """The routers of every model of a trace. One whose routers do not correspond to the first's is
    read as the first. Raises MoescopeError where specs mean nothing."""
    groups = list(router_groups(meta))
    shapes = [[(router.layer, router.num_experts) for router in group] for group in groups]
    return tuple(
        table_of(meta, which if shape == shapes[0] else 0) for which, shape in enumerate(shapes)
    ) or (table_of(meta),)


def table_of(meta: TraceMeta, which: int = 0) -> RouterTable:
    """Read the specs of the routers of one model of a trace; raises MoescopeError where they mean
    nothing."""
    groups = list(router_groups(meta)) or [()]
    routers, before = groups[which], sum(len(group) for group in groups[:which])
    engine: Any = meta.engine if which == 0 else meta.engine.get("second")
    dtype = str(engine.get("dtype", "float32")) if isinstance(engine, dict) else "float32"
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    try:
        specs = tuple(RouterSpec.from_json(r.spec).resolved(dtype) for r in routers)
    except ValueError as error:
        raise MoescopeError(f"router spec: {printable(str(error))}", code=ExitCode.TRACE) from None
    return RouterTable(
        specs=specs,
        labels=tuple(f"{r.layer:02d}{'a' if r.site == 'attention' else ''}" for r in routers),
        layers=tuple(router.layer for router in routers),
        num_experts=np.array([r.num_experts for r in routers], np.int16),
        top_k=np.array([r.num_experts_per_tok for r in routers], np.int16),
        allowed=tuple(spec.allowed_score_sum() for spec in specs),
        tensors={
            at - before: tensors
            for at, tensors in meta.router_tensors.items()
            if before <= at < before + len(routers)
        },
        dtype=dtype,
        model=_name_of(meta, which) if len(groups) > 1 else "",
    )


def _name_of(meta: TraceMeta, which: int) -> str:
    models = meta.models
    return printable(str(models[which].get("name", "")), 30) if which < len(models) else ""


def as_generated(table: RouterTable, lane: Lane, row: int) -> Decision:
    """The decision that was recorded for the token in `row`."""
    weights, scores = lane.weights[row], lane.scores[row]
    used = lane.expert_ids[row] >= 0
    return Decision(
        expert_ids=lane.expert_ids[row],
        weights=None if np.isnan(weights[used]).all() else weights,
        scores=None if np.isnan(scores[used]).all() else scores,
        score_sum=lane.score_sum[row],
        mass=lane.mass[row],
        entropy=lane.entropy[row],
        margin=lane.margin[row],
        runner_up=lane.runner_up[row],
        in_scores=margins_in_scores(table, lane.variants[row]),
        basis=GENERATED,
    )


def specs_under(table: RouterTable, expression: str) -> tuple[RouterSpec, ...]:
    """The routers under a variant expression; raises MoescopeError where it does not apply."""
    held = table.respecs.get(expression)
    if held is None:
        from moescope.variants import apply
        from moescope.variants.steering import split

        variant = split(expression)[0]  # what is steered happens beside the spec
        held = tuple(
            apply(variant, spec, layer)
            for spec, layer in zip(table.specs, table.layers, strict=True)
        )
        table.respecs[expression] = held
    return held


def equal(left: tuple[RouterSpec, ...], right: tuple[RouterSpec, ...]) -> bool:
    """Whether two lists of routers always give the same experts and weights."""
    return all(a is b or _equal(a, b) for a, b in zip(left, right, strict=True))


def equal_lanes(table: RouterTable, left: str, right: str) -> bool:
    """Whether two lane expressions always give the same experts and weights: the routers agree, and
    so does what is steered and rewired beside them. Raises MoescopeError where one does not apply.
    """
    if _beside_specs(table, left) != _beside_specs(table, right):
        return False
    return equal(specs_under(table, left), specs_under(table, right))


def _beside_specs(table: RouterTable, expression: str) -> tuple[tuple[object, ...], ...]:
    """What no spec says: steering and edits of the decoder, router by router."""
    from moescope.variants import parse
    from moescope.variants.steering import of_routers, split

    variant, steered = split(expression)
    specs = specs_under(table, expression)
    steering = of_routers(steered, list(zip(table.layers, specs, strict=True)))
    rewired = (parse(variant).decoder_at(layer) for layer in table.layers)
    return tuple(zip(steering, rewired, strict=True))


@lru_cache(maxsize=4096)
def _equal(a: RouterSpec, b: RouterSpec) -> bool:
    return a.equal(b)


def reroute(
    table: RouterTable,
    expression: str,
    logits: NDArray[np.float32],  # [L, E]
    token_id: int = 0,
) -> Decision:
    """What the routers would have decided under `expression`, given the same logits.

    Routers with equal specs go through the kernel in one call.
    """
    from moescope.kernels import route

    specs = specs_under(table, expression)
    groups: dict[tuple[RouterSpec, int], list[int]] = {}
    for router, spec in enumerate(specs):
        groups.setdefault((spec, int(table.num_experts[router])), []).append(router)
    width = max(spec.policy.num_experts_per_tok for spec in specs)
    basis = f"on the same logits: {expression}"
    decision = _nothing(table.count, width, basis, margins_in_scores(table, expression))
    for (spec, experts), members in groups.items():
        vectors = _vectors(table, spec, members, token_id)
        routing = route(logits[members, :experts], spec, **vectors)
        picked = routing.expert_ids.shape[1]
        assert decision.weights is not None and decision.scores is not None
        decision.expert_ids[members, :picked] = routing.expert_ids
        decision.weights[members, :picked] = routing.weights
        decision.scores[members, :picked] = routing.scores
        for name in ("score_sum", "mass", "entropy", "margin", "runner_up"):
            getattr(decision, name)[members] = getattr(routing, name)
    return decision


def _vectors(
    table: RouterTable, spec: RouterSpec, members: list[int], token_id: int
) -> dict[str, Any]:
    """The learned vectors that `spec` uses, one row for each of its routers."""
    own = [table.tensors.get(router, {}) for router in members]
    found: dict[str, Any] = {}
    for name in ("correction_bias", "per_expert_scale"):
        if all(name in tensors for tensors in own):
            found[name] = np.stack([tensors[name] for tensors in own])
    if spec.wiring.hash_table and all("hash_table" in tensors for tensors in own):
        found["hash_table"] = own[0]["hash_table"]
        found["token_ids"] = np.full(len(members), token_id, np.int64)
    return found


def _nothing(
    routers: int, width: int, basis: str, in_scores: NDArray[np.bool_] | None = None
) -> Decision:
    nan = np.full(routers, np.nan, np.float32)
    return Decision(
        expert_ids=np.full((routers, width), -1, np.int16),
        weights=np.zeros((routers, width), np.float32),
        scores=np.zeros((routers, width), np.float32),
        score_sum=nan.copy(),
        mass=nan.copy(),
        entropy=nan.copy(),
        margin=nan.copy(),
        runner_up=np.full(routers, -1, np.int16),
        in_scores=np.ones(routers, np.bool_) if in_scores is None else in_scores,
        basis=basis,
    )


def not_recorded(routers: int, basis: str) -> Decision:
    """A decision nobody can know: no experts, no sums."""
    return replace(_nothing(routers, 1, basis), weights=None, scores=None)


def sums_wrong(table: RouterTable, decision: Decision) -> NDArray[np.bool_]:
    """Which routers' sums the trained spec does not allow: [L]."""
    lowest_score = _lowest(decision.expert_ids, decision.scores)
    ratio = margin_ratio(decision.margin, decision.in_scores, lowest_score)
    tail = _lowest(decision.expert_ids, decision.weights) * ratio
    return np.asarray(_wrong(table, decision.score_sum[None], tail[None])[0], np.bool_)


def rows_wrong(table: RouterTable, lane: Lane, start: int) -> NDArray[np.bool_]:
    """Which tokens from row `start` on hold a sum that the trained spec does not allow: [T]."""
    ids, margins = lane.expert_ids[start:], lane.margin[start:]
    if not len(ids):
        return np.zeros(0, np.bool_)
    units = {name: margins_in_scores(table, name) for name in set(lane.variants[start:])}
    in_scores = np.stack([units[name] for name in lane.variants[start:]])
    ratio = margin_ratio(margins, in_scores, _lowest(ids, lane.scores[start:]))
    tail = _lowest(ids, lane.weights[start:]) * ratio
    return np.asarray(_wrong(table, lane.score_sum[start:], tail).any(axis=1))


def _wrong(
    table: RouterTable,
    score_sum: NDArray[np.float32],  # [T, L]
    tail: NDArray[np.float32],  # [T, L] the least that the first expert not chosen would weigh
) -> NDArray[np.bool_]:
    """Sums outside what is allowed, and sums that are whole although the trained router leaves
    out a share of them: where a saturated softmax gives all to the chosen, 1 is right."""
    wrong = sum_violations(score_sum, table.allowed, dtype=table.dtype)
    for router, allowed in enumerate(table.allowed):
        if isinstance(allowed, tuple) and np.isfinite(allowed[1]):
            slack = max(1e-5, 4 * UNIT[table.dtype]) * max(allowed[1], 1.0)
            whole = np.abs(score_sum[:, router] - allowed[1]) <= slack
            missing = np.nan_to_num(tail[:, router], nan=np.inf) > 4 * slack
            wrong[:, router] |= whole & missing
    return wrong


def margin_ratio(
    margin: NDArray[np.float32],
    in_scores: NDArray[np.bool_],
    lowest: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Score of the first expert not chosen over that of the last chosen one: 1 is a tie. Shapes
    alike. NaN where that is not known."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = np.where(in_scores, 1 - margin / np.abs(lowest), np.exp(-margin))
    return np.asarray(np.clip(share, 0.0, 1.0), np.float32)


def margins_in_scores(table: RouterTable, expression: str) -> NDArray[np.bool_]:
    """Whether routers under `expression` select by score; else their margins are of logits."""
    try:
        specs = specs_under(table, expression)
    except MoescopeError:  # a variant this version does not know
        specs = table.specs
    return np.array([spec.margin_unit == "score" for spec in specs])


def margin_unit(table: RouterTable, expression: str, router: int) -> str:
    """`score` or `logit`: what a router's margin is of under a lane expression."""
    return "score" if margins_in_scores(table, expression)[router] else "logit"


def one_unit(units: Iterable[str]) -> str:
    """The unit that all margins share; "" where they do not."""
    kinds = set(units)
    return kinds.pop() if len(kinds) == 1 else ""


def _lowest(ids: NDArray[np.int16], values: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The smallest value among the picks; NaN where it was not recorded. [..., K] -> [...]."""
    if values is None:
        return np.full(ids.shape[:-1], np.nan, np.float32)
    return np.asarray(np.where(ids >= 0, values, np.inf).min(axis=-1), np.float32)


def near_ties(decision: Decision) -> NDArray[np.bool_]:
    """Which routers nearly chose otherwise: the first expert not chosen within `NEAR_TIE`. [L]."""
    lowest = _lowest(decision.expert_ids, decision.scores)
    known = np.where(np.isfinite(lowest), lowest, 1.0).astype(np.float32)
    return margin_ratio(decision.margin, decision.in_scores, known) > 1 - NEAR_TIE


def expected_sum(allowed: float | tuple[float, float] | None) -> str:
    """What the trained spec says about the sum, in words."""
    if allowed is None:
        return ""
    if isinstance(allowed, tuple):
        return f"trained: below {allowed[1]:g}" if np.isfinite(allowed[1]) else ""
    return f"trained: {allowed:g}"


def bar_variants(table: RouterTable) -> tuple[str, ...]:
    """The variants a new screen offers, `trained` first: those that change something, and softmax
    over the selected also where it changes nothing, because that is worth seeing."""
    k = int(table.top_k.max(initial=1))
    names = ["softmax_over_selected", "no_renormalisation"]
    names += [f"num_experts_per_tok-{max(1, k // 4)}"] if k > 1 else []
    names += ["wrong_scoring_func", "raw_logits_as_weights"]
    chosen, same = [TRAINED], list[str]()
    for name in names:
        specs = _meaningful(table, name)
        if specs is not None:
            (same if equal(specs, table.specs) else chosen).append(name)
    return (*chosen, *(name for name in same if name == "softmax_over_selected"))


def _meaningful(table: RouterTable, name: str) -> tuple[RouterSpec, ...] | None:
    """The specs under `name`, None where it is meant for other routers."""
    from moescope.variants import CATALOGUE, applicable

    try:
        specs = specs_under(table, name)
    except MoescopeError:
        return None
    meant = name not in CATALOGUE or equal(specs, table.specs)
    return specs if meant or all(applicable(name, spec) for spec in table.specs) else None
