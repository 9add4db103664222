"""Two lanes beside each other: where experts differ, how far they agree, in words and over tokens.

Pure. The measures are those of `diagnosis.compare`; here they become panels. The table of layers
and the bar of lanes are in `compare_layers.py`. Letters: T tokens, L routers, E expert classes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.causes import TITLES as CAUSES
from moescope.diagnosis.compare import Agreement, Comparison, Divergence, Pairing
from moescope.diagnosis.rows import Rows, decisions
from moescope.ui import view
from moescope.ui.history import Lane
from moescope.ui.panels import AgreementData, AgreementRow, MapData, PlotData
from moescope.ui.routers import TRAINED, RouterTable, as_generated, margin_unit, sums_wrong
from moescope.ui.text import gap

MODES = ("xor", "left", "right")
FED_ALIKE, FREE = "same tokens", "free text"
TITLES = {
    "xor": "{0} xor {1} · experts chosen by one lane only · colour = how often lately",
    "left": "{0} alone · marks = this token · colour = recent load",
    "right": "{1} alone · marks = this token · colour = recent load",
}
BLOCK = 256  # tokens compared in one call: some milliseconds


class Pair:
    """Two lanes and what their comparison has found so far; fed as they grow."""

    def __init__(
        self, table: RouterTable, a: Lane, b: Lane, other: RouterTable | None = None
    ) -> None:
        self.tables = table, other or table  # B's too, where it is of another model
        self.table, self.a, self.b = table, a, b
        self.letters = tuple(view.LETTERS[lane.lane % len(view.LETTERS)] for lane in (a, b))
        self.rows = 0  # compared
        self.differs = np.zeros(0, np.float32)  # [rows] share of A's picks that B did not make
        self._pairing = Pairing(a.lane, b.lane, table.layers)
        self._found: tuple[int, Comparison] | None = None

    def feed(self, most: int = BLOCK) -> bool:
        """Compare what both lanes have by now, at most so many tokens; True when there was more."""
        stop = min(self.a.count, self.b.count)
        if stop < self.rows:  # a lane was cut: begin anew
            self.__init__(self.table, self.a, self.b, self.tables[1])  # type: ignore[misc]
        stop = min(stop, self.rows + most)
        if stop == self.rows:
            return False
        rows = rows_of(self.a, self.rows, stop), rows_of(self.b, self.rows, stop)
        self._pairing.compare(*rows)
        shares = differing(self.a, self.b, self.rows, stop)
        self.differs = np.concatenate([self.differs, shares])
        self.rows = stop
        return True

    @property
    def comparison(self) -> Comparison:
        if self._found is None or self._found[0] != self.rows:
            self._found = self.rows, self._with_units(self._pairing.result())
        return self._found[1]

    def _with_units(self, found: Comparison) -> Comparison:
        """The first divergence with what its margins are of: lanes may change their variant."""
        first = found.first_divergence
        if first is None:
            return found
        units = []
        for table, lane in zip(self.tables, (self.a, self.b), strict=True):
            row = lane.row_of(first.position)
            variant = TRAINED if row is None else lane.variants[row]
            units.append(margin_unit(table, variant, first.router))
        named = replace(first, margin_unit_a=units[0], margin_unit_b=units[1])
        return replace(found, first_divergence=named)

    @property
    def fed_alike(self) -> bool:
        """Both lanes were fed the same tokens to the end, and expectations were compared."""
        known = bool(np.isfinite(self.b.kl[-1:]).any() or np.isfinite(self.a.kl[-1:]).any())
        return known and self.comparison.ids_part_at is None


def rows_of(lane: Lane, start: int, stop: int) -> Rows:
    """Some tokens of a lane as the comparison takes them."""
    some = slice(start, stop)
    return Rows(
        position=lane.position[some],
        token_id=lane.token_id[some],
        expert_ids=lane.expert_ids[some],
        weights=lane.weights[some],
        score_sum=lane.score_sum[some],
        margin=lane.margin[some],
        kl=lane.kl[some],
        top1=np.full(stop - start, np.nan),
    )


def used(lane: Lane, start: int, stop: int, experts: int) -> NDArray[np.bool_]:
    """Which experts each token used: [T, L, E]."""
    ids = lane.expert_ids[start:stop]
    marks = np.zeros((*ids.shape[:2], experts), np.bool_)
    tokens, routers, ranks = np.nonzero(ids >= 0)
    marks[tokens, routers, ids[tokens, routers, ranks]] = True
    return marks


def difference_map(
    pair: Pair, row: int, mode: str, cursor: view.Cursor, window: int = view.WINDOW
) -> MapData:
    """The map of both lanes, or of one, at `row`."""
    table, experts = pair.table, pair.table.widest
    start = max(0, row + 1 - window)
    a, b = (used(lane, start, row + 1, experts) for lane in (pair.a, pair.b))
    now_a, now_b = a[-1], b[-1]
    if mode == "xor":
        counts = (a ^ b).sum(axis=0)
        marks = np.where(now_a & ~now_b, 1, 0) + np.where(now_b & ~now_a, 2, 0)
    else:
        one = a if mode == "left" else b
        counts, marks = one.sum(axis=0), one[-1].astype(int) * (1 if mode == "left" else 2)
    differ = np.maximum((now_a & ~now_b).sum(axis=1), (now_b & ~now_a).sum(axis=1))
    alone = {"left": f"{pair.letters[0]} alone", "right": f"{pair.letters[1]} alone"}
    shown, its = (pair.b, pair.tables[1]) if mode == "right" else (pair.a, table)
    return MapData(
        levels=view.load_levels(counts, row + 1 - start, table),
        marks=marks.astype(np.uint8),
        num_experts=table.num_experts,
        gutter=table.labels,
        score_sum=shown.score_sum[row],
        sum_wrong=sums_wrong(its, as_generated(its, shown, row)),
        cursor=(cursor.router, cursor.expert),
        right=tuple(f"{n}/{k}" for n, k in zip(differ, now_a.sum(axis=1), strict=True)),
        heading=alone.get(mode, "differ"),
        title=TITLES[mode].format(*pair.letters),
    )


def agreement(pair: Pair, row: int, why: str = "", mode: str = "") -> AgreementData:
    """The numbers beside the map: this token, and all tokens both lanes read alike. `why` is the
    cause of the first divergence, where it is known; `mode` how the lanes are fed, else what the
    pair itself tells."""
    comparison = pair.comparison
    now = decisions(rows_of(pair.a, row, row + 1), rows_of(pair.b, row, row + 1))
    count = max(1, int(now["tokens"].sum()))
    run = comparison.same_ids.all
    k = int(pair.table.top_k.max(initial=1))
    difference = now["weight_difference"].sum() / max(1, now["weight_tokens"].sum())
    left, right = pair.letters
    rows = [
        AgreementRow(
            f"same top-{k} set", f"{now['same_set'].sum():.0f}/{count}", _of(run.same_set)
        ),
        AgreementRow("same order", f"{now['same_order'].sum():.0f}/{count}", _of(run.same_order)),
        AgreementRow(f"overlap of {k}", f"{k * now['overlap'].sum() / count:.1f}", _times(run, k)),
        AgreementRow(
            "same first expert", f"{now['same_top1'].sum():.0f}/{count}", _of(run.same_top1)
        ),
        AgreementRow("mean |Δ weight|", f"{difference:.3f}", _of(run.weight_difference, 3)),
        AgreementRow(
            f"Σ  {left} / {right}",
            f"{now['score_sum_a'].sum() / count:.2f}/{now['score_sum_b'].sum() / count:.2f}",
            f"{_of(run.score_sum_a)}/{_of(run.score_sum_b)}",
        ),
    ]
    if comparison.kl_mean is not None:
        rows.append(AgreementRow("KL, nats", _small(pair.b.kl[row]), _small(comparison.kl_mean)))
    later = comparison.compounded.all
    if later.tokens:
        rows.append(AgreementRow("overlap after the split", "", _times(later, k)))
    kind = mode or (FED_ALIKE if pair.fed_alike else FREE)
    return AgreementData(f"agreement · {kind}", tuple(rows), verdict(comparison, why))


def verdict(found: Comparison, why: str = "") -> str:
    """In one sentence or two, what came out."""
    if found.tokens == 0:
        return "nothing to compare yet"
    experts = "with the same experts"
    if found.first_divergence is not None:
        experts = f"with other experts from {place_of(found.first_divergence, why)} on"
    if found.ids_part_at is None:
        return f"the same text for {found.tokens} tokens, {experts}"
    if found.ids_part_at == 0:
        return "different texts from the first token on"
    return f"the same text before token {found.ids_part_at}, {experts}; then they part"


def place_of(first: Divergence, why: str = "") -> str:
    """`token 0, L02 (drifted input, Δ 0.002 score)`."""
    cause = f"{CAUSES[why]}, " if why else ""
    return f"token {first.position}, L{first.layer:02d} ({cause}{margin_of(first)})"


def margin_of(first: Divergence) -> str:
    """How close the left lane's decision was: `Δ 0.002 score`."""
    return f"Δ {gap(first.margin_a)} {first.margin_unit_a}".rstrip()


def divergence(pair: Pair, row: int) -> PlotData:
    """KL where it was recorded, else the share of experts that differ, over positions."""
    stop = pair.rows
    kl = pair.b.kl[:stop]
    positions = pair.a.position[:stop].copy()
    at = int(positions[row]) if row < stop else None
    left, right = pair.letters
    if np.isfinite(kl).mean() > 0.5:
        title = f"KL({left}‖{right}) over tokens, nats"
        return PlotData(title, positions, (("KL", kl.copy()),), cursor=at)
    title = "share of experts that differ, over tokens"
    return PlotData(title, positions, (("differ", pair.differs),), cursor=at, bounds=(0.0, 1.0))


def differing(a: Lane, b: Lane, start: int, stop: int) -> NDArray[np.float32]:
    """The share of A's picks that B did not make, for each token: [T]."""
    ids_a, ids_b = a.expert_ids[start:stop], b.expert_ids[start:stop]
    shared = ((ids_a[:, :, :, None] == ids_b[:, :, None, :]) & (ids_a[:, :, :, None] >= 0)).sum(
        axis=(1, 2, 3)
    )
    total = np.maximum((ids_a >= 0).sum(axis=(1, 2)), 1)
    return np.asarray(1 - shared / total, np.float32)


def next_difference(pair: Pair, row: int, by: int) -> int | None:
    """The next token, forwards or back, that some router gave other experts."""
    rows = np.flatnonzero(pair.differs > 0)
    beyond = rows[rows > row] if by > 0 else rows[rows < row][::-1]
    return int(beyond[0]) if len(beyond) else None


def _of(value: float | None, digits: int = 2) -> str:
    return "─" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "─"
    return "0" if value == 0 else f"{value:.0e}" if value < 5e-4 else f"{value:.3f}"


def _times(found: Agreement, k: int) -> str:
    return "─" if found.overlap is None else f"{k * found.overlap:.1f}"
