"""The compare screen's table of layers and its bar of lanes, as plain values. Pure.

Letters: L routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moescope.diagnosis.causes import LogitsJudge
from moescope.diagnosis.gate_rows import GateRows
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import Frame
from moescope.ui import routers, view
from moescope.ui.compare_view import Pair
from moescope.ui.history import History, Lane
from moescope.ui.routers import TRAINED, RouterTable, as_generated, near_ties, sums_wrong


@dataclass(frozen=True, slots=True)
class LayerPair:
    """One router in both lanes: this token, then all tokens both read alike. None: not known."""

    label: str
    differ: int  # experts that only the left lane chose
    of: int  # chosen by it; 0: no decision
    why: str  # cause of the difference: gate, input, either, together; "": none, or not known
    margin: float | None  # of the left lane
    margin_unit: str  # "score" or "logit"
    near_tie: bool
    sums: tuple[float | None, float | None]
    wrong: tuple[bool, bool]  # sums that the trained router does not allow
    same: float | None  # share of tokens with the same set
    flips: int


@dataclass(frozen=True, slots=True)
class LayersData:
    """The table. `letters` of the two lanes; `cursor` a router."""

    title: str
    note: str
    letters: tuple[str, str]
    rows: tuple[LayerPair, ...]
    cursor: int


@dataclass(frozen=True, slots=True)
class GateData:
    """Rows of the right lane's gate by the flips they turned: (`L00 E004`, flips, largest
    difference of its logit); `said` is the sentence above them."""

    title: str
    said: str
    rows: tuple[tuple[str, int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LaneItem:
    """One lane on the bar; `found` says how it stands to the first: `63 % ≠@10`."""

    letter: str
    title: str
    found: str
    shown: bool


@dataclass(frozen=True, slots=True)
class LanesData:
    """All lanes, and whether they read the same tokens."""

    items: tuple[LaneItem, ...]
    mode: str


def layers_data(
    pair: Pair, row: int, cursor: int, whys: Mapping[int, str], note: str = ""
) -> LayersData:
    """Every router at `row`. `whys`: causes of this token's flips by router."""
    table, comparison = pair.table, pair.comparison
    lanes = tuple(zip(pair.tables, (pair.a, pair.b), strict=True))
    made = tuple(as_generated(its, lane, row) for its, lane in lanes)
    wrong = tuple(sums_wrong(its, one) for its, one in zip(pair.tables, made, strict=True))
    close = near_ties(made[0])
    rows = []
    for router in range(table.count):
        mine, theirs = (
            {int(e) for e in decision.expert_ids[router] if e >= 0} for decision in made
        )
        sums = tuple(_known(decision.score_sum[router]) for decision in made)
        run = comparison.same_ids.routers[router]
        rows.append(
            LayerPair(
                label=table.labels[router],
                differ=max(len(mine - theirs), len(theirs - mine)),
                of=len(mine),
                why=whys.get(router, ""),
                margin=_known(made[0].margin[router]),
                margin_unit="score" if made[0].in_scores[router] else "logit",
                near_tie=bool(close[router]),
                sums=(sums[0], sums[1]),
                wrong=(bool(wrong[0][router]), bool(wrong[1][router])),
                same=run.same_set if run.tokens else None,
                flips=sum(comparison.flips_by_router[router].values()),
            )
        )
    left, right = pair.letters
    title = f"layers · {left} against {right}"
    return LayersData(title, note, (left, right), tuple(rows), cursor)


def gate_data(pair: Pair, found: GateRows | None, fed_alike: bool) -> GateData:
    """The rows of B's gate to keep in higher precision; `found` None: nothing was told."""
    right = pair.letters[1]
    title = f"gate of {right} · rows to keep in higher precision"
    if found is None or not found.flips:
        unfed = "gates are crossed where both are fed the same tokens: t"
        return GateData(title, "no flip comes from its rows" if fed_alike else unfed)
    rows = tuple(
        (f"L{row.layer:02d} E{row.expert:03d}", row.flips, row.error) for row in found.rows
    )
    flips = "1 flip comes" if found.flips == 1 else f"{found.flips} flips come"
    shared = f", {found.shared} by several rows at once" if found.shared else ""
    return GateData(title, f"{flips} from its rows{shared}", rows)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def causes_at(table: RouterTable, history: History, a: Lane, b: Lane, row: int) -> dict[int, str]:
    """Why routers chose otherwise for one token that both lanes read alike, by router. Empty where
    logits were not recorded, texts have parted, or a variant is not known here. Between gates that
    differ only the run could tell."""
    told = history.flips.causes(b.sequence, b.lane, int(b.position[row]))
    if told is not None and a.lane == 0:
        return {router: why for router, why in told.items() if why}
    if a.model != b.model:
        return {}
    if (a.token_id[: row + 1] != b.token_id[: row + 1]).any():
        return {}
    left, right = (_with_logits(history, lane, row) for lane in (a, b))
    if left.logits is None or right.logits is None:
        return {}
    picks = [[{int(e) for e in ids if e >= 0} for ids in f.expert_ids] for f in (left, right)]
    chosen = enumerate(zip(*picks, strict=True))
    flipped = [router for router, (mine, theirs) in chosen if mine and theirs and mine != theirs]
    tensors = [table.tensors.get(router, {}) for router in range(table.count)]
    try:
        found = LogitsJudge(lambda name: _specs(table, name), tensors)(left, right, flipped)
    except (MoescopeError, KeyError):  # a variant of another version, a vector that is not there
        return {}
    return dict(zip(flipped, found, strict=True))


def _with_logits(history: History, lane: Lane, row: int) -> Frame:
    return replace(lane.frame(row), logits=history.logits(lane, row))


def _specs(table: RouterTable, expression: str) -> Sequence[RouterSpec]:
    specs = routers.specs_under(table, expression)
    return tuple(spec.resolved(table.dtype) for spec in specs)


def lanes_data(
    expressions: Mapping[int, tuple[RouterTable, str]],
    pairs: Mapping[int, Pair],
    shown: tuple[int, int],
    mode: str,
) -> LanesData:
    """All lanes by number, each with the routers of its model and its expression. `pairs` holds the
    comparison of each with the first."""
    items = []
    for number, (table, expression) in sorted(expressions.items()):
        title = expression if expression == TRAINED else view.title_of(table, expression)
        title = f"{table.model} {title}" if table.model else title
        items.append(
            LaneItem(
                letter=view.LETTERS[number % len(view.LETTERS)],
                title=title,
                found=_stands(pairs.get(number)),
                shown=number in shown,
            )
        )
    return LanesData(tuple(items), mode)


def _stands(pair: Pair | None) -> str:
    """`63 % ≠@10`: same sets on the same tokens, and the first token whose experts differ."""
    if pair is None or not pair.rows:
        return ""
    found = pair.comparison
    run = found.same_ids.all
    if not run.tokens:
        return "≠@0"
    first = found.first_divergence
    at = "" if first is None else f" ≠@{first.position}"
    return f"{run.same_set:.0%}{at}"
