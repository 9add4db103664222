"""A lane's text as transcript cells, tinted by a measure. Cells of old tokens are kept, so a new
token costs one cell; levels are recomputed only when the measure or the router changed. No
widgets here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.frames import PREFILL
from moescope.ui.history import History, Lane
from moescope.ui.panels import LEVELS, TokenCell, TranscriptData
from moescope.ui.routers import RouterTable, margin_ratio, margins_in_scores, rows_wrong

Values = NDArray[np.floating[Any]]
Measure = Callable[[RouterTable, Lane, int, int], Values]


def _sum(table: RouterTable, lane: Lane, router: int, start: int) -> Values:
    allowed = table.allowed[router]
    top = allowed[1] if isinstance(allowed, tuple) else (allowed or 1.0)
    return lane.score_sum[start:, router] / np.float32(max(top, 1e-9))


def _margin(table: RouterTable, lane: Lane, router: int, start: int) -> Values:
    """Bright is close: 1 at a tie, 0 where the next expert is half as good or worse."""
    units = {name: margins_in_scores(table, name)[router] for name in set(lane.variants[start:])}
    in_scores = np.array([units[name] for name in lane.variants[start:]], np.bool_)
    chosen = lane.expert_ids[start:, router] >= 0
    lowest = np.where(chosen, lane.scores[start:, router], np.inf).min(axis=1)
    return 2 * margin_ratio(lane.margin[start:, router], in_scores, lowest) - 1


def _entropy(table: RouterTable, lane: Lane, router: int, start: int) -> Values:
    most = np.log(max(2, int(table.num_experts[router])))
    return lane.entropy[start:, router] / np.float32(most)


def _surprise(table: RouterTable, lane: Lane, router: int, start: int) -> Values:
    return 1 - np.exp(np.minimum(lane.logprob[start:], 0.0))


def _novelty(table: RouterTable, lane: Lane, router: int, start: int) -> Values:
    used = max(1, int(table.top_k.sum()))
    return np.sqrt(np.array(lane.first_use[start:], float) / used)


# name -> (how the title says it, measure scaled to 0..1); {at} is the router's label
TINTS: dict[str, tuple[str, Measure]] = {
    "sum": ("Σ at L{at}", _sum),
    "margin": ("margin at L{at}", _margin),
    "entropy": ("entropy at L{at}", _entropy),
    "p": ("surprise, 1 − p", _surprise),
    "novelty": ("experts first used", _novelty),
}


def levels(name: str, table: RouterTable, lane: Lane, router: int, start: int) -> NDArray[np.int64]:
    """Tint levels 0..7 of the tokens from row `start` on; what is not known is 0."""
    values = np.nan_to_num(TINTS[name][1](table, lane, router, start), nan=0.0)
    return np.clip((values * LEVELS).astype(np.int64), 0, LEVELS - 1)


class Cells:
    """The cells of one transcript, kept between ticks."""

    def __init__(self) -> None:
        self.epoch = 0
        self.tint_epoch = 0
        self._lane: Lane | None = None
        self._tint: tuple[str, int, int | None] = ("", -1, None)
        self._cells: list[TokenCell] = []

    def data(
        self,
        history: History,
        table: RouterTable,
        lane: Lane | None,
        router: int,
        tint: str,
        cursor: int | None,
        follow: bool,
        subtitle: str = "",
        title: str = "",
        parting: int | None = None,
    ) -> TranscriptData:
        if lane is not self._lane or (lane is not None and lane.count < len(self._cells)):
            self._lane, self._cells = lane, []
            self.epoch += 1
        key = (tint, router if "{at}" in TINTS[tint][0] else -1, parting)
        if key != self._tint:
            if self._cells:
                self.tint_epoch += 1
            self._tint, self._cells = key, []
        if lane is not None and lane.count > len(self._cells):
            self._extend(history, table, lane, router, tint, parting)
        measure = TINTS[tint][0].format(at=table.labels[router])
        return TranscriptData(
            cells=tuple(self._cells),
            cursor=cursor,
            follow=follow,
            epoch=self.epoch,
            title=title or f"tokens · tinted by {measure}",
            subtitle=subtitle or ("follow" if follow else ""),
            tint_epoch=self.tint_epoch,
        )

    def _extend(
        self,
        history: History,
        table: RouterTable,
        lane: Lane,
        router: int,
        tint: str,
        parting: int | None,
    ) -> None:
        start = len(self._cells)
        tinted = levels(tint, table, lane, router, start)
        wrong = rows_wrong(table, lane, start)
        for row in range(start, lane.count):
            text, special = lane.texts[row], False
            if not text:
                piece = history.pieces.get(int(lane.token_id[row]), "")
                special = is_special(piece)
                text = piece if special else ""
            position = int(lane.position[row])
            prompt = lane.phase[row] == PREFILL
            self._cells.append(
                TokenCell(
                    text=text,
                    level=int(tinted[row - start]),
                    position=position,
                    kind="special" if special else ("prompt" if prompt else "text"),
                    marked=position == parting if parting is not None else bool(wrong[row - start]),
                )
            )


def is_special(piece: str) -> bool:
    """Control tokens read `<name>`; pieces of a character read `<0xE2>` and are not."""
    return len(piece) > 2 and piece[0] == "<" and piece[-1] == ">" and not piece.startswith("<0x")
