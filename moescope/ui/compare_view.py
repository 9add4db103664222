"""Two lanes beside each other: where experts differ, how far they agree, in words and over tokens.

Pure. The measures are those of `diagnosis.compare`; here they become panels. Letters: T tokens, L
routers, E expert classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.compare import Agreement, Comparison, Pairing, decisions
from moescope.ui import view
from moescope.ui.history import Lane
from moescope.ui.panels import AgreementData, AgreementRow, MapData, PlotData
from moescope.ui.routers import RouterTable, as_generated, sums_wrong

MODES = ("xor", "A", "B")
TITLES = {
    "xor": "A xor B · experts chosen by one lane only · colour = how often lately",
    "A": "A alone · dots = this token · colour = recent load",
    "B": "B alone · dots = this token · colour = recent load",
}


class Pair:
    """Two lanes and what their comparison has found so far; fed as they grow."""

    def __init__(self, table: RouterTable, a: Lane, b: Lane) -> None:
        self.table, self.a, self.b = table, a, b
        self.rows = 0  # compared
        self._pairing = Pairing(a.lane, b.lane, table.layers)

    def feed(self) -> bool:
        """Compare what both lanes have by now; True when there was more."""
        stop = min(self.a.count, self.b.count)
        for row in range(self.rows, stop):
            self._pairing.feed(self.a.frame(row))
            self._pairing.feed(self.b.frame(row))
        grown, self.rows = stop > self.rows, max(stop, self.rows)
        return grown

    @property
    def comparison(self) -> Comparison:
        return self._pairing.result()


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
        one = a if mode == "A" else b
        counts, marks = one.sum(axis=0), one[-1].astype(int) * (1 if mode == "A" else 2)
    differ = (now_a & ~now_b).sum(axis=1)
    shown = pair.b if mode == "B" else pair.a
    return MapData(
        levels=view.load_levels(counts, row + 1 - start, table),
        marks=marks.astype(np.uint8),
        num_experts=table.num_experts,
        gutter=table.labels,
        score_sum=shown.score_sum[row],
        sum_wrong=sums_wrong(table, as_generated(table, shown, row)),
        cursor=(cursor.router, cursor.expert),
        right=tuple(f"{n}/{k}" for n, k in zip(differ, now_a.sum(axis=1), strict=True)),
        title=TITLES[mode],
    )


def agreement(pair: Pair, row: int) -> AgreementData:
    """The numbers beside the map: this token, and all tokens both lanes read alike."""
    comparison = pair.comparison
    now = decisions(pair.a.frame(row), pair.b.frame(row))
    count = max(1, int(now["tokens"].sum()))
    run = comparison.same_ids.all
    k = int(pair.table.top_k.max(initial=1))
    difference = now["weight_difference"].sum() / max(1, now["weight_tokens"].sum())
    rows = [
        AgreementRow(
            f"same top-{k} set", f"{now['same_set'].sum():.0f}/{count}", _of(run.same_set)
        ),
        AgreementRow(f"overlap of {k}", f"{k * now['overlap'].sum() / count:.1f}", _times(run, k)),
        AgreementRow(
            "same first expert", f"{now['same_top1'].sum():.0f}/{count}", _of(run.same_top1)
        ),
        AgreementRow("mean |Δ weight|", f"{difference:.3f}", _of(run.weight_difference, 3)),
        AgreementRow(
            "Σ  A / B",
            f"{now['score_sum_a'].sum() / count:.2f}/{now['score_sum_b'].sum() / count:.2f}",
            f"{_of(run.score_sum_a)}/{_of(run.score_sum_b)}",
        ),
    ]
    if comparison.kl_mean is not None:
        kl = pair.b.kl[row]
        rows.append(AgreementRow("KL, nats", _of(float(kl), 3), _of(comparison.kl_mean, 3)))
    later = comparison.compounded.all
    if later.tokens:
        rows.append(AgreementRow("overlap after the split", "", _times(later, k)))
    fed_alike = bool(np.isfinite(pair.b.kl[-1:]).any()) and comparison.ids_part_at is None
    kind = "same tokens" if fed_alike else "free text"
    return AgreementData(f"agreement · {kind}", tuple(rows), verdict(comparison))


def verdict(found: Comparison) -> str:
    """In one sentence or two, what came out."""
    first = found.first_divergence
    if found.tokens == 0:
        return "nothing to compare yet"
    experts = "with the same experts"
    if first is not None:
        experts = f"with other experts from token {first.position}, L{first.layer:02d} on"
    if found.ids_part_at is None:
        return f"the same text for {found.tokens} tokens, {experts}"
    if found.ids_part_at == 0:
        return "different texts from the first token on"
    return f"the same text before token {found.ids_part_at}, {experts}; then they part"


def divergence(pair: Pair, row: int) -> PlotData:
    """KL where it was recorded, else the share of experts that differ, over positions."""
    stop = min(pair.a.count, pair.b.count)
    kl = pair.b.kl[:stop]
    positions = pair.a.position[:stop].copy()
    at = int(positions[row]) if row < stop else None
    if np.isfinite(kl).mean() > 0.5:
        return PlotData("KL(A‖B) over tokens, nats", positions, (("KL", kl.copy()),), cursor=at)
    shares = differing(pair.a, pair.b, stop)
    title = "share of experts that differ, over tokens"
    return PlotData(title, positions, (("differ", shares),), cursor=at)


def differing(a: Lane, b: Lane, stop: int) -> NDArray[np.float32]:
    """The share of A's picks that B did not make, for each token: [T]."""
    ids_a, ids_b = a.expert_ids[:stop], b.expert_ids[:stop]
    shared = ((ids_a[:, :, :, None] == ids_b[:, :, None, :]) & (ids_a[:, :, :, None] >= 0)).sum(
        axis=(1, 2, 3)
    )
    total = np.maximum((ids_a >= 0).sum(axis=(1, 2)), 1)
    return np.asarray(1 - shared / total, np.float32)


def next_difference(pair: Pair, row: int, by: int) -> int | None:
    """The next token, forwards or back, that some router gave other experts."""
    stop = min(pair.a.count, pair.b.count)
    rows = np.flatnonzero(differing(pair.a, pair.b, stop) > 0)
    beyond = rows[rows > row] if by > 0 else rows[rows < row][::-1]
    return int(beyond[0]) if len(beyond) else None


def _of(value: float | None, digits: int = 2) -> str:
    return "─" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _times(found: Agreement, k: int) -> str:
    return "─" if found.overlap is None else f"{k * found.overlap:.1f}"
