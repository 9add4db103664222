"""Two lanes side by side: where they part, and how far their routers agree.

Pure functions over frames, and `Pairing`, which takes frames as they come at some 150 µs each, or
many tokens at once as columns (`rows.py`). Tokens are compared at equal positions. While both lanes
were fed the same ids, what differs is the routers' doing; after that lanes read different texts,
and their figures are kept apart as compounded. A *flip* is another set of experts for the same ids;
why it came is asked of a judge (`causes.py`). `compare_run.py` runs lanes. Letters: T tokens, L
routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.rows import SUMS, Rows, decisions, of_frame
from moescope.trace.frames import Frame, RouterInfo

LISTED = 1000  # flips that are kept one by one
MARGINS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, math.inf)  # upper ends of bins

# For two frames and some routers, why each of them chose otherwise: one of `causes.CAUSES`.
Judge = Callable[[Frame, Frame, Sequence[int]], Sequence[str]]

# For a lane expression, what the margins of each router are of: "score" or "logit".
Units = Callable[[str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A flip: another set of experts for the same input ids."""

    position: int
    router: int  # index among the routers
    layer: int
    margin_a: float | None  # how close lane A's decision was
    margin_b: float | None
    experts_a: tuple[int, ...]
    experts_b: tuple[int, ...]
    cause: str = ""  # gate, input, either, together; "" where nothing tells
    margin_unit_a: str = ""  # "score" or "logit"; "" where nothing tells
    margin_unit_b: str = ""


@dataclass(frozen=True, slots=True)
class MarginBin:
    """Decisions of lane A by margin (in its `margin_units_a`): how many flipped in lane B."""

    below: float | None  # None: the last, without an upper end
    decisions: int
    flips: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over tokens, of one router or of all. None where nothing was compared."""

    tokens: int
    same_set: float | None = None  # share of tokens with the same set of experts
    same_order: float | None = None
    overlap: float | None = None  # experts both chose, of the larger number chosen
    jaccard: float | None = None  # experts both chose, of those either chose
    same_top1: float | None = None
    weight_difference: float | None = None  # mean |difference| over experts either chose
    score_sum_a: float | None = None
    score_sum_b: float | None = None


@dataclass(frozen=True, slots=True)
class Agreements:
    """`all` over every router and token; `routers` one each, in their order."""

    all: Agreement
    routers: tuple[Agreement, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Lane `lane_b` against lane `lane_a`."""

    lane_a: int
    lane_b: int
    variant_a: str
    variant_b: str
    layers: tuple[int, ...]
    tokens: int  # compared: positions both lanes have a frame for
    ids_part_at: int | None  # the first position whose ids differ; None: they never do
    first_divergence: Divergence | None
    flips: int  # while both were fed the same ids
    causes: dict[str, int]  # of these flips; "" where nothing tells
    flips_by_router: tuple[dict[str, int], ...]  # cause -> flips
    first_flips: tuple[Divergence, ...]  # at most LISTED, in the order of positions
    margins: tuple[MarginBin, ...]
    margin_units_a: tuple[str, ...]  # of each router, "score" or "logit"; empty: nothing tells
    margin_units_b: tuple[str, ...]
    same_ids: Agreements  # while both were fed the same ids
    compounded: Agreements  # after that
    kl_tokens: int
    kl_mean: float | None  # nats, of next-token distributions, where recorded
    kl_max: float | None
    top1_agrees: float | None  # share of tokens with the same most likely next token

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not a finite number is null."""
        document: dict[str, Any] = plain(self)
        return document


class Pairing:
    """Compares two lanes of one sequence as their frames come, in any order."""

    def __init__(
        self,
        lane_a: int,
        lane_b: int,
        layers: Sequence[int],
        judge: Judge | None = None,
        keep_rows: bool = False,
        units: tuple[Units, Units] | None = None,
    ) -> None:
        self.lanes = (lane_a, lane_b)
        self.judge, self.units = judge, units
        self.rows: list[dict[str, Any]] | None = [] if keep_rows else None
        self.layers = tuple(layers)
        self.variants = ["", ""]
        self.first: Divergence | None = None
        self.ids_part_at: int | None = None
        self.tokens = 0
        self._sums = np.zeros((2, len(SUMS), len(self.layers)))  # same ids, compounded
        self._waiting: tuple[dict[int, Frame], dict[int, Frame]] = ({}, {})
        self._kl: list[float] = []
        self._top1 = [0, 0]  # agreed, compared
        self._flips: list[Divergence] = []
        self._causes: list[dict[str, int]] = [{} for _ in self.layers]
        self._bins = np.zeros((2, len(MARGINS)), np.int64)  # decisions, flips

    def feed(self, frame: Frame) -> None:
        """Take a frame; one of another lane is passed over."""
        if frame.lane not in self.lanes:
            return
        side = self.lanes.index(frame.lane)
        partner = self._waiting[1 - side].pop(frame.position, None)
        if partner is None:  # logits are large: kept only for a judge
            logits = frame.logits if self.judge is not None else None
            self._waiting[side][frame.position] = replace(frame, logits=logits, alternatives=())
            return
        a, b = (partner, frame) if side else (frame, partner)
        self.variants = [a.variant, b.variant]
        self.compare(of_frame(a), of_frame(b), (a, b))

    def compare(self, a: Rows, b: Rows, frames: tuple[Frame, Frame] | None = None) -> None:
        """Take rows of both lanes at equal positions, in their order. A judge is asked where the
        one token they hold is given as `frames` too."""
        differs = a.token_id != b.token_id
        if differs.any():
            at = int(a.position[int(differs.argmax())])
            self.ids_part_at = at if self.ids_part_at is None else min(at, self.ids_part_at)
        apart = np.zeros(len(a.position), np.bool_)
        if self.ids_part_at is not None:
            apart = a.position >= self.ids_part_at
        self.tokens += len(apart)
        found = decisions(a, b)
        stacked = np.stack([found[name] for name in SUMS])  # [sums, T, L]
        for which, rows in enumerate((~apart, apart)):
            self._sums[which] += stacked[:, rows].sum(1)
        alike = ~apart
        if alike.any():
            self._find_flips(a[alike], b[alike], {k: v[alike] for k, v in found.items()}, frames)
            kl, top1 = b.kl[alike], b.top1[alike]
            self._kl += kl[~np.isnan(kl)].tolist()
            self._top1[0] += int(np.nansum(top1))
            self._top1[1] += int((~np.isnan(top1)).sum())
        if self.rows is not None:
            self.rows += [_row(a, b, t, bool(apart[t]), found) for t in range(len(apart))]

    def result(self) -> Comparison:
        """What was found so far."""
        same, compounded = (_agreements(sums) for sums in self._sums)
        finite = [value for value in self._kl if math.isfinite(value)]
        return Comparison(
            lane_a=self.lanes[0],
            lane_b=self.lanes[1],
            variant_a=self.variants[0],
            variant_b=self.variants[1],
            layers=self.layers,
            tokens=self.tokens,
            ids_part_at=self.ids_part_at,
            first_divergence=self.first,
            flips=sum(sum(causes.values()) for causes in self._causes),
            causes=_added(self._causes),
            flips_by_router=tuple(dict(causes) for causes in self._causes),
            first_flips=tuple(sorted(self._flips, key=lambda f: (f.position, f.router))),
            margins=tuple(
                MarginBin(below if math.isfinite(below) else None, int(all_), int(flipped))
                for below, all_, flipped in zip(MARGINS, *self._bins, strict=True)
            ),
            margin_units_a=self._units(0),
            margin_units_b=self._units(1),
            same_ids=same,
            compounded=compounded,
            kl_tokens=len(self._kl),
            kl_mean=sum(finite) / len(finite) if finite else None,
            kl_max=max(self._kl, default=None),
            top1_agrees=self._top1[0] / self._top1[1] if self._top1[1] else None,
        )

    def _units(self, side: int) -> tuple[str, ...]:
        return () if self.units is None else tuple(self.units[side](self.variants[side]))

    def _unit(self, side: int, router: int) -> str:
        units = self._units(side)
        return units[router] if units else ""

    def _find_flips(
        self,
        a: Rows,
        b: Rows,
        found: Mapping[str, NDArray[np.float64]],
        frames: tuple[Frame, Frame] | None,
    ) -> None:
        decided = found["tokens"] > 0  # [T, L]
        flipped = decided & (found["same_set"] == 0)
        known = decided & np.isfinite(a.margin)
        places = np.searchsorted(MARGINS, a.margin, side="right").clip(max=len(MARGINS) - 1)
        self._bins[0] += np.bincount(places[known], minlength=len(MARGINS))
        self._bins[1] += np.bincount(places[known & flipped], minlength=len(MARGINS))
        where = np.argwhere(flipped).tolist()
        if self.judge is not None and frames is not None:
            causes = self.judge(*frames, [router for _, router in where])
        else:
            causes = [""] * len(where)
        for (t, router), cause in zip(where, causes, strict=True):
            self._causes[router][cause] = self._causes[router].get(cause, 0) + 1
            place = (int(a.position[t]), router)
            first = self.first is None or place < (self.first.position, self.first.router)
            if first or len(self._flips) < LISTED:
                flip = self._flip(a, b, t, router, cause)
                self.first = flip if first else self.first
                self._flips += [flip] if len(self._flips) < LISTED else []

    def _flip(self, a: Rows, b: Rows, t: int, router: int, cause: str) -> Divergence:
        return Divergence(
            position=int(a.position[t]),
            router=router,
            layer=self.layers[router],
            margin_a=_number(a.margin[t, router]),
            margin_b=_number(b.margin[t, router]),
            experts_a=tuple(int(e) for e in a.expert_ids[t, router] if e >= 0),
            experts_b=tuple(int(e) for e in b.expert_ids[t, router] if e >= 0),
            cause=cause,
            margin_unit_a=self._unit(0, router),
            margin_unit_b=self._unit(1, router),
        )


def _row(
    a: Rows, b: Rows, t: int, apart: bool, found: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """One token, layer by layer, as JSON values."""
    flags = ("same_set", "same_order")
    numbers = ("jaccard", "weight_difference", "score_sum_a", "score_sum_b")
    known = not apart and not math.isnan(b.top1[t])
    return {
        "position": int(a.position[t]),
        "token_ids": [int(a.token_id[t]), int(b.token_id[t])],
        "same_ids": not apart,
        "kl": None if apart else _number(b.kl[t]),
        "top1_agrees": bool(b.top1[t]) if known else None,
        **{name: [bool(value) for value in found[name][t]] for name in flags},
        **{name: [round(float(value), 6) for value in found[name][t]] for name in numbers},
        "margin_a": [_number(value) for value in a.margin[t]],
        "margin_b": [_number(value) for value in b.margin[t]],
    }


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def compare_lanes(
    lanes: Mapping[int, Iterable[Frame]],
    routers: Sequence[RouterInfo] | Sequence[int],
    judge: Judge | None = None,
    units: Units | None = None,
) -> tuple[Comparison, ...]:
    """Every lane but the first against the first. `lanes` are frames of one sequence by lane;
    `routers` say which layer each router is in (or are those layers)."""
    layers = [router.layer if isinstance(router, RouterInfo) else router for router in routers]
    held = {lane: list(frames) for lane, frames in sorted(lanes.items())}
    if not held:
        return ()
    first, *others = held
    both = None if units is None else (units, units)
    pairings = [Pairing(first, other, layers, judge, units=both) for other in others]
    for pairing in pairings:
        for frame in (*held[first], *held[pairing.lanes[1]]):
            pairing.feed(frame)
    return tuple(pairing.result() for pairing in pairings)


def first_divergence(
    lanes: Mapping[int, Iterable[Frame]], routers: Sequence[RouterInfo] | Sequence[int]
) -> Divergence | None:
    """The earliest divergence of any lane from the first one."""
    found = [c.first_divergence for c in compare_lanes(lanes, routers)]
    return min(
        (d for d in found if d is not None), key=lambda d: (d.position, d.router), default=None
    )


def _agreements(sums: NDArray[np.float64]) -> Agreements:
    return Agreements(
        all=_agreement(sums.sum(1), sums.shape[1]),
        routers=tuple(_agreement(column, 1) for column in sums.T),
    )


def _agreement(sums: NDArray[np.float64], routers: int) -> Agreement:
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    decided, weighed = values.pop("tokens"), values.pop("weight_tokens")
    if not decided:
        return Agreement(0)
    difference = values.pop("weight_difference")
    return Agreement(
        tokens=round(decided / max(routers, 1)),
        weight_difference=difference / weighed if weighed else None,
        **{name: value / decided for name, value in values.items()},
    )


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON values; what is not finite is null."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return _number(value) if isinstance(value, float) else value
