"""Two traces against each other: of one text by two engines, two versions, two devices.

Lanes are laid side by side position by position, routers layer by layer; what only one trace has is
said. Everything else is the comparison of `compare.py`. Letters: T tokens, L routers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.balance_sums import Trace
from moescope.diagnosis.compare import Comparison, Pairing, plain
from moescope.diagnosis.rows import Rows
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import RouterInfo, TraceMeta
from moescope.trace.measures import recorded_weights
from moescope.trace.metadata import router_groups
from moescope.variants import apply
from moescope.variants.steering import split

BLOCK = 512  # tokens compared at once
Place = tuple[int, str]  # layer, site

# fields of meta that say under what conditions a trace was made
CONDITIONS = ("rank_ordered", "ids_space", "weights_kind", "last_token_present")


@dataclass(frozen=True, slots=True)
class LaneDiff:
    """One sequence of one lane in both traces."""

    sequence: int
    lanes: tuple[int, int]
    only_in_a: int  # tokens without a partner
    only_in_b: int
    unordered: int  # decisions with the same experts in another order
    weights_apart: float  # largest |Δ weight| where the experts are the same; NaN: not recorded
    comparison: Comparison
    same: bool


@dataclass(frozen=True, slots=True)
class TraceDiff:
    """`same` is what the exit code says: the same tokens, experts, order, and weights within the
    tolerance, in everything both traces have."""

    same: bool
    lanes: tuple[LaneDiff, ...]
    conditions: dict[str, tuple[Any, Any]]  # of meta and engine, where they differ
    routers_only_in_a: tuple[Place, ...]
    routers_only_in_b: tuple[Place, ...]
    lanes_only_in_a: tuple[tuple[int, int], ...]  # sequence, lane
    lanes_only_in_b: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = plain(self)
        return document


def diff(
    a: Trace, b: Trace, *, lanes: tuple[int, int] | None = None, tolerance: float = 1e-5
) -> TraceDiff:
    """Compare two traces. `lanes`: one lane of each; None: the lanes both have.

    `tolerance` is how far weights may be apart. Raises `MoescopeError` (TRACE) where the traces
    share no router, or no lane.
    """
    groups = [_routers(trace) for trace in (a, b)]
    shared = [place for place in groups[0] if place in groups[1]]
    if not shared:
        raise MoescopeError(
            f"routers: the traces share no layer: {_layers(groups[0])} and {_layers(groups[1])}",
            hint="MoE ordinals and absolute layer numbers do not mix",
            code=ExitCode.TRACE,
        )
    columns = tuple([group[place] for place in shared] for group in groups)
    held = [_lanes(trace) for trace in (a, b)]
    pairs = _pairs(held[0], held[1], lanes)
    found = tuple(
        _lane(a, b, sequence, pair, columns, [place[0] for place in shared], tolerance)
        for sequence, pair in pairs
    )
    return TraceDiff(
        same=all(lane.same for lane in found) and len(groups[0]) == len(groups[1]) == len(shared),
        lanes=found,
        conditions=_conditions(a.meta, b.meta),
        routers_only_in_a=tuple(place for place in groups[0] if place not in groups[1]),
        routers_only_in_b=tuple(place for place in groups[1] if place not in groups[0]),
        lanes_only_in_a=() if lanes else tuple(sorted(held[0] - held[1])),
        lanes_only_in_b=() if lanes else tuple(sorted(held[1] - held[0])),
    )


def _routers(trace: Trace) -> dict[Place, int]:
    """The place of each router in a frame, of the first model there is."""
    routers: Sequence[RouterInfo] = next(iter(router_groups(trace.meta)), ())
    return {(router.layer, router.site): at for at, router in enumerate(routers)}


def _layers(places: dict[Place, int]) -> str:
    return ", ".join(str(layer) for layer, _ in list(places)[:6]) + (" …" * (len(places) > 6))


def _lanes(trace: Trace) -> set[tuple[int, int]]:
    keys = trace.keys()
    known = keys[(keys[:, 0] >= 0) & (keys[:, 1] >= 0)]
    return {(int(s), int(lane)) for s, lane in np.unique(known[:, :2], axis=0)}


def _pairs(
    a: set[tuple[int, int]], b: set[tuple[int, int]], lanes: tuple[int, int] | None
) -> list[tuple[int, tuple[int, int]]]:
    if lanes is None:
        found = [(sequence, (lane, lane)) for sequence, lane in sorted(a & b)]
    else:
        both = {s for s, lane in a if lane == lanes[0]} & {s for s, lane in b if lane == lanes[1]}
        found = [(sequence, lanes) for sequence in sorted(both)]
    if not found:
        raise MoescopeError(
            "lanes: the traces share none",
            hint="--lanes A B, for a lane of each",
            code=ExitCode.TRACE,
        )
    return found


def _conditions(a: TraceMeta, b: TraceMeta) -> dict[str, tuple[Any, Any]]:
    """What differs in how the traces were made."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(a, name), getattr(b, name)) for name in CONDITIONS
    }
    for name in ("name", "version", "device", "dtype", "quantisation"):
        pairs[f"engine {name}"] = a.engine.get(name), b.engine.get(name)
    models = [meta.models[0] if meta.models else {} for meta in (a, b)]
    for name in ("config_hash", "weights_hash", "tokenizer_hash"):
        pairs[name] = models[0].get(name), models[1].get(name)
    for name in ("num_experts", "num_experts_per_tok"):
        left, right = (sorted({getattr(r, name) for r in meta.routers}) for meta in (a, b))
        pairs[name] = left, right
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _lane(
    a: Trace,
    b: Trace,
    sequence: int,
    lanes: tuple[int, int],
    columns: tuple[list[int], ...],
    layers: Sequence[int],
    tolerance: float,
) -> LaneDiff:
    frames = [trace.lane_frames(lane, sequence) for trace, lane in zip((a, b), lanes, strict=True)]
    positions = [trace.keys()[at, 2] for trace, at in zip((a, b), frames, strict=True)]
    common = np.intersect1d(*positions)
    rows = [
        at[np.searchsorted(position, common)]
        for at, position in zip(frames, positions, strict=True)
    ]
    sides = zip((a, b), rows, columns, strict=True)
    (variant_a, units_a), (variant_b, units_b) = (_conditioned(*side) for side in sides)
    pairing = Pairing(*lanes, layers, units=(lambda _: units_a, lambda _: units_b))
    pairing.variants = [variant_a, variant_b]
    unordered, apart = 0, float("nan")
    for start in range(0, len(common), BLOCK):
        some = slice(start, start + BLOCK)
        left, right = (
            _rows(trace, at[some], places)
            for trace, at, places in zip((a, b), rows, columns, strict=True)
        )
        pairing.compare(left, right)
        unordered += _unordered(left, right)
        apart = float(np.fmax(apart, _apart(left, right)))
    found = pairing.result()
    everything = found.same_ids.all
    return LaneDiff(
        sequence=sequence,
        lanes=lanes,
        only_in_a=len(positions[0]) - len(common),
        only_in_b=len(positions[1]) - len(common),
        unordered=unordered,
        weights_apart=apart,
        comparison=found,
        same=len(common) == len(positions[0]) == len(positions[1])
        and found.ids_part_at is None
        and everything.same_set in (None, 1.0)
        and unordered == 0
        and not apart > tolerance,
    )


def _conditioned(
    trace: Trace, indices: NDArray[np.int64], places: Sequence[int]
) -> tuple[str, tuple[str, ...]]:
    """The variant these frames were made under, and what the margins of each router are of then;
    empty where they are not all of one, or the trace does not say."""
    ends = {trace.frame(int(at)).variant for at in indices[[0, -1][: len(indices)]]}
    if len(ends) != 1:
        return "", ()
    variant, routers = ends.pop(), [trace.meta.routers[at] for at in places]
    if not all(router.spec for router in routers):
        return variant, ()
    try:
        specs = [
            apply(split(variant)[0], RouterSpec.from_json(router.spec), router.layer)
            for router in routers
        ]
    except (ValueError, MoescopeError):  # of another version
        return variant, ()
    return variant, tuple(spec.margin_unit for spec in specs)


def _rows(trace: Trace, indices: NDArray[np.int64], places: Sequence[int]) -> Rows:
    """The frames at `indices`, routers in the order of `places`."""
    low, high = int(indices.min()), int(indices.max()) + 1

    def column(name: str) -> NDArray[Any]:
        return trace.column(name, low, high)[indices - low]

    ids, meta = column("expert_ids"), trace.meta
    if ids.shape[1] <= max(places):
        raise MoescopeError("frames: expected a decision of every router", code=ExitCode.TRACE)
    weighed = meta.record != "ids" and "weights" not in meta.absent
    weights = recorded_weights(column("weights"), ids) if weighed else None
    return Rows(
        position=column("position"),
        token_id=column("token_id"),
        expert_ids=ids[:, places],
        weights=None if weights is None else weights[:, places],
        score_sum=column("score_sum")[:, places],
        margin=column("margin")[:, places],
        kl=np.full(len(indices), np.nan),
        top1=np.full(len(indices), np.nan),
    )


def _same_sets(a: Rows, b: Rows) -> NDArray[np.bool_]:
    width = min(a.expert_ids.shape[2], b.expert_ids.shape[2])
    beyond = (a.expert_ids[..., width:] >= 0).any(2) | (b.expert_ids[..., width:] >= 0).any(2)
    alike = np.sort(a.expert_ids[..., :width], 2) == np.sort(b.expert_ids[..., :width], 2)
    return np.asarray(alike.all(2) & ~beyond)


def _unordered(a: Rows, b: Rows) -> int:
    width = min(a.expert_ids.shape[2], b.expert_ids.shape[2])
    alike = (a.expert_ids[..., :width] == b.expert_ids[..., :width]).all(2)
    return int((_same_sets(a, b) & ~alike).sum())


def _apart(a: Rows, b: Rows) -> float:
    """The largest |Δ weight| of an expert, where both chose the same; NaN: not recorded."""
    if a.weights is None or b.weights is None:
        return math.nan
    same = _same_sets(a, b)
    if not same.any():
        return math.nan
    width = min(a.expert_ids.shape[2], b.expert_ids.shape[2])
    by_expert = [
        np.take_along_axis(
            rows.weights[..., :width], np.argsort(rows.expert_ids[..., :width], 2, kind="stable"), 2
        )
        for rows in (a, b)
        if rows.weights is not None
    ]
    return float(np.nanmax(np.abs(by_expert[0] - by_expert[1])[same], initial=0.0))
