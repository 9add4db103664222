"""The routers of a trace as specs, and what each decided: as generated, or under a variant on the
same logits. Pure functions over arrays; panels are made of these in `view.py`.

Letters: L routers, E expert classes (null experts included), K picked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import TraceMeta
from moescope.ui.history import Lane

TRAINED = "trained"
SUM_TOLERANCE = 0.01  # bfloat16 weights: eight of them, each rounded to 3 digits


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
    basis: str  # "as generated" or "on the same logits: <variant>"


def table_of(meta: TraceMeta) -> RouterTable:
    """Read the specs of a trace's routers."""
    dtype = str(meta.engine.get("dtype", "float32"))
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    specs = tuple(RouterSpec.from_json(r.spec).resolved(dtype) for r in meta.routers)
    return RouterTable(
        specs=specs,
        labels=tuple(f"{r.layer:02d}{'a' if r.site == 'attention' else ''}" for r in meta.routers),
        layers=tuple(router.layer for router in meta.routers),
        num_experts=np.array([r.num_experts for r in meta.routers], np.int16),
        top_k=np.array([r.num_experts_per_tok for r in meta.routers], np.int16),
        allowed=tuple(spec.allowed_score_sum() for spec in specs),
        tensors=meta.router_tensors,
    )


def as_generated(lane: Lane, row: int) -> Decision:
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
        basis="as generated",
    )


def specs_under(table: RouterTable, expression: str) -> tuple[RouterSpec, ...]:
    """The routers under a variant expression; raises MoescopeError where it does not apply."""
    held = table.respecs.get(expression)
    if held is None:
        from moescope.variants import apply

        held = tuple(
            apply(expression, spec, layer)
            for spec, layer in zip(table.specs, table.layers, strict=True)
        )
        table.respecs[expression] = held
    return held


def equal(left: tuple[RouterSpec, ...], right: tuple[RouterSpec, ...]) -> bool:
    """Whether two lists of routers always give the same experts and weights."""
    return all(a is b or a.equal(b) for a, b in zip(left, right, strict=True))


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
    decision = _nothing(table.count, width, f"on the same logits: {expression}")
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


def _nothing(routers: int, width: int, basis: str) -> Decision:
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
        basis=basis,
    )


def not_recorded(routers: int, basis: str) -> Decision:
    """A decision nobody can know: no experts, no sums."""
    return replace(_nothing(routers, 1, basis), weights=None, scores=None)


def sums_wrong(
    table: RouterTable,
    score_sum: NDArray[np.float32],  # [L] or [T, L]
) -> NDArray[np.bool_]:
    """Where a sum is not one the trained spec allows: not the demanded value where renormalised, at
    or above the largest possible value where not (only a renormalised router gives exactly 1)."""
    wrong = np.zeros(score_sum.shape, np.bool_)
    for router, allowed in enumerate(table.allowed):
        values = score_sum[..., router]
        if allowed is None:
            continue
        with np.errstate(invalid="ignore"):
            if isinstance(allowed, tuple):
                low, high = allowed
                everything = table.top_k[router] >= table.num_experts[router]
                tolerance = 1e-4 * max(1.0, high)
                wrong[..., router] = (values < low) | (
                    values > high + tolerance if everything else values > high - tolerance
                )
            else:
                wrong[..., router] = np.abs(values - allowed) > SUM_TOLERANCE * abs(allowed)
    return wrong


def expected_sum(allowed: float | tuple[float, float] | None) -> str:
    """What the trained spec says about the sum, in words."""
    if allowed is None:
        return ""
    if isinstance(allowed, tuple):
        return f"below {allowed[1]:g}"
    return f"{allowed:g} by the spec"


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
    from moescope.errors import MoescopeError
    from moescope.variants import CATALOGUE, applicable

    try:
        specs = specs_under(table, name)
    except MoescopeError:
        return None
    meant = name not in CATALOGUE or equal(specs, table.specs)
    return specs if meant or all(applicable(name, spec) for spec in table.specs) else None
