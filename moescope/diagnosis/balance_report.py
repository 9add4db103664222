"""The balance of a whole trace: loads, losses and pairs of one lane, counted block by block.

`balance_of` reads any trace that can be asked for columns, through `balance_sums.py`. The measures
themselves are in `balance.py`, the noise floor in `balance_chance.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moescope.diagnosis import balance, balance_chance
from moescope.diagnosis.balance_sums import PHASES, Array, Sums, Trace, classes, counted
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import RouterInfo
from moescope.trace.metadata import router_groups

CELLS = 1 << 22  # routers × experts; the largest model has some 30,000
# name -> measure of a load, in the order they are shown
LOAD_MEASURES: dict[str, Callable[[Array], Array]] = {
    "cv": balance.variation,
    "max_over_mean": balance.max_over_mean,
    "max_violation": balance.max_violation,
    "gini": balance.gini,
    "jain": balance.jain,
    "effective_experts": balance.effective_experts,
    "dead": balance.dead,
    "cold": balance.cold,
}
BALANCED = {
    **{"cv": 0.0, "max_over_mean": 1.0, "max_violation": 0.0, "gini": 0.0, "jain": 1.0},
    **{"effective_experts": 1.0, "dead": 0.0, "cold": 0.0, "layer_loss": 1.0, "sequence_loss": 1.0},
}


@dataclass(frozen=True, slots=True)
class Chance:
    """What an even router would show after as many tokens; see `balance_chance`."""

    cv: float
    cv_bound: float  # exceeded by chance in 5 % of cases
    max_violation: float
    max_violation_bound: float
    dead: float
    chi_square: float
    p_value: float
    tokens_needed: int | None  # for a CV like the one seen to be more than chance


@dataclass(frozen=True, slots=True)
class Pair:
    """Two experts that were picked for the same token."""

    a: int
    b: int
    tokens: int
    lift: float


@dataclass(frozen=True, slots=True)
class RouterBalance:
    """One router over the counted tokens. Losses are None where no logits were recorded."""

    layer: int
    site: str
    num_experts: int  # classes, null experts included
    picked: float  # experts a token, on average
    tokens: int
    load: tuple[int, ...]
    measures: dict[str, float]  # by the names of LOAD_MEASURES
    coverage: tuple[tuple[int, float, float], ...]  # (top N, share of picks, N / E)
    chance: Chance
    by_phase: dict[str, dict[str, float]]  # prefill, decode: tokens and the measures
    prefill_decode: float  # distance between the loads of both phases
    prefill_decode_chance: float  # what chance alone makes of it
    layer_loss: float | None
    sequence_loss: float | None
    z_loss: float | None
    pairs: tuple[Pair, ...]  # those that come together most often
    balanced_lift: float


@dataclass(frozen=True, slots=True)
class AuxiliaryLoss:
    """The auxiliary loss in both normalisations, over tokens whose logits were recorded."""

    tokens: int
    pooled: float  # transformers: pooled over layers
    pooled_balanced: float  # K
    layers_mean: float  # Switch, DeepSeek: each layer by itself
    layers_balanced: float  # 1
    sequences_mean: float
    z_loss: float


@dataclass(frozen=True, slots=True)
class Balance:
    """Everything `moescope balance` says. `padding` counts the tokens that were left out."""

    lane: int
    variants: tuple[str, ...]
    sequences: int
    tokens: int
    prefill: int
    decode: int
    padding: int
    routers: tuple[RouterBalance, ...]
    auxiliary: AuxiliaryLoss | None
    paired: bool  # pairs were counted

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not a finite number is null."""
        return {**_plain(asdict(self)), "balanced": BALANCED}


def balance_of(
    trace: Trace, lane: int | None = None, *, padding: Sequence[int] = (), pairs: int = 4
) -> Balance:
    """The balance of every sequence of `lane` (None: the first there is).

    `padding` are token ids that count nowhere; rows without a decision never do. `pairs`: how many
    of the commonest pairs a router lists, 0 for all. Raises `MoescopeError` (TRACE) for a trace
    without routers, (USAGE) for a lane that is not in it.
    """
    if not trace.meta.routers:
        raise MoescopeError(
            "routers: expected at least one, found none: expert classes are not known",
            code=ExitCode.TRACE,
        )
    keys = trace.keys()
    present = [int(number) for number in np.unique(keys[:, 1]) if number >= 0]
    if not present:
        raise MoescopeError("the trace holds no token", code=ExitCode.TRACE)
    lane = present[0] if lane is None else lane
    if lane not in present:
        letters = ", ".join("ABCDEFGH"[n] if n < 8 else str(n) for n in present[:9])
        raise MoescopeError(f"--lane: expected one of {letters}")
    routers = _routers_of(trace, keys, lane)
    if len(routers) * max(map(classes, routers)) > CELLS:
        raise MoescopeError("routers: more experts than any model has", code=ExitCode.TRACE)
    sums, counts = counted(trace, keys, lane, routers, padding)
    found = tuple(_router(sums, index, router, pairs) for index, router in enumerate(routers))
    return Balance(
        lane=lane,
        routers=found,
        auxiliary=_auxiliary(sums, routers, found),
        paired=bool(sums.pairs),
        **counts,
    )


def _routers_of(trace: Trace, keys: Array, lane: int) -> tuple[RouterInfo, ...]:
    """The routers of the model the lane runs: where there are two models, those whose number fits
    the lane's frames."""
    groups = list(router_groups(trace.meta))
    at = int(np.flatnonzero(keys[:, 1] == lane)[0])
    width = trace.column("expert_ids", at, at + 1).shape[1]
    return next((group for group in groups if len(group) == width), groups[0])


def _router(sums: Sums, at: int, router: RouterInfo, most: int) -> RouterBalance:
    E = classes(router)
    load = sums.load[:, at, :E]
    both, tokens = load.sum(axis=0), int(sums.rows[:, at].sum())
    picked = float(both.sum()) / tokens if tokens else math.nan
    values = _measured(both)
    prefill, decode = (int(rows) for rows in sums.rows[:, at])
    tops = [2**n for n in range(E.bit_length()) if 2**n < E]
    scored = sums.scored[at] > 0
    one = slice(at, at + 1)
    return RouterBalance(
        layer=router.layer,
        site=router.site,
        num_experts=E,
        picked=picked,
        tokens=tokens,
        load=tuple(both.tolist()),
        measures=values,
        coverage=tuple((n, float(balance.coverage(both[None], n)[0]), n / E) for n in tops),
        chance=_chance(values["cv"], tokens, E, picked),
        by_phase={
            name: {"tokens": float(sums.rows[phase, at]), **_measured(load[phase])}
            for name, phase in PHASES.items()
        },
        prefill_decode=float(balance.distance(load[:1], load[1:])[0]),
        prefill_decode_chance=balance_chance.expected_distance(load[0], load[1], prefill, decode),
        layer_loss=float(
            balance.layer_loss(sums.score_picks[one, :E], sums.scores[one, :E], sums.scored[one])[0]
        )
        if scored
        else None,
        sequence_loss=float(sums.sequence_losses[at] / sums.sequences[at]) if scored else None,
        z_loss=float(sums.z[at] / sums.scored[at]) if scored else None,
        pairs=_pairs(sums.pairs[at][:E, :E], tokens, most) if sums.pairs else (),
        balanced_lift=(picked - 1) * E / (picked * (E - 1)) if E > 1 else math.nan,
    )


def _measured(load: Array) -> dict[str, float]:
    return {name: float(measure(load[None])[0]) for name, measure in LOAD_MEASURES.items()}


def _chance(cv: float, tokens: int, E: int, k: float) -> Chance:
    nan = math.nan
    if not tokens:
        return Chance(nan, nan, nan, nan, nan, nan, nan, None)
    args = (tokens, E, k)
    statistic = balance_chance.chi_square(cv, *args)
    return Chance(
        cv=balance_chance.expected_variation(*args),
        cv_bound=balance_chance.bound_variation(*args),
        max_violation=balance_chance.expected_max_violation(*args),
        max_violation_bound=balance_chance.bound_max_violation(*args),
        dead=balance_chance.expected_dead(*args),
        chi_square=statistic,
        p_value=balance_chance.p_value(statistic, E - 1),
        tokens_needed=balance_chance.tokens_needed(cv, E, k),
    )


def _pairs(counts: Array, tokens: int, most: int) -> tuple[Pair, ...]:
    """The commonest pairs, those of equal counts by id."""
    a, b = np.triu_indices(len(counts), 1)
    order = np.argsort(-counts[a, b], kind="stable")
    order = order[counts[a, b][order] > 0]
    lift = balance.lift(counts, tokens)
    return tuple(
        Pair(int(a[i]), int(b[i]), int(counts[a[i], b[i]]), float(lift[a[i], b[i]]))
        for i in order[: most or None]
    )


def _auxiliary(
    sums: Sums, routers: Sequence[RouterInfo], found: Sequence[RouterBalance]
) -> AuxiliaryLoss | None:
    """None without logits. Routers of different width cannot be pooled: NaN."""
    if not sums.scored.any():
        return None
    alike = len({(classes(r), r.num_experts_per_tok) for r in routers}) == 1
    k = float(routers[0].num_experts_per_tok) if alike else math.nan
    pooled = balance.pooled_loss(sums.softmax_picks, sums.softmax, sums.scored)

    def mean(name: str) -> float:
        values = [getattr(router, name) for router in found]
        return float(np.mean([value for value in values if value is not None]))

    return AuxiliaryLoss(
        tokens=int(sums.scored.max()),
        pooled=pooled if alike else math.nan,
        pooled_balanced=k,
        layers_mean=mean("layer_loss"),
        layers_balanced=1.0,
        sequences_mean=mean("sequence_loss"),
        z_loss=mean("z_loss"),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return (value if math.isfinite(value) else None) if isinstance(value, float) else value
