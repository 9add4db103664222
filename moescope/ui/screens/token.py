"""The token drill-down: one row a layer, the scores of every expert of the layer under the cursor.

A modal over the main screen that moves the same cursor; `y` copies the token as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.strip import Strip

from moescope.safety import printable
from moescope.ui import keys, token_view
from moescope.ui.looking import Looking
from moescope.ui.ramp import BARS, WRONG, quantise
from moescope.ui.routers import one_unit
from moescope.ui.text import cells, cut, fit, gap, number
from moescope.ui.view import quoted
from moescope.ui.widgets.key_line import KeyLine
from moescope.ui.widgets.panel import Panel, Row, Span

BARS_HEIGHT = 6  # rows left to the scores below the table, at least


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """What the table draws."""

    title: str
    note: str
    rows: tuple[token_view.LayerRow, ...]
    cursor: int  # router
    sort: str


class LayersTable(Panel[TokenTable]):
    """Routers as rows; the one under the cursor stays in view."""

    DEFAULT_CSS = "LayersTable { border: none; height: auto; }"

    def draw(self, data: TokenTable, width: int, height: int) -> Sequence[Row]:
        unit = one_unit(row.margin_unit for row in data.rows)
        margin = fit(f"Δ {unit}".rstrip(), 7 if unit else 13, ">")
        head = f"{'layer':>6}  {'Σ':>6}  {'entropy':>7}  {margin}  {'kept':>4}  experts, weights"
        rows: list[Row] = [((cut(head, width), "dim"),)]
        at = next((i for i, row in enumerate(data.rows) if row.router == data.cursor), 0)
        room = max(1, height - 1)
        first = max(0, min(at - room // 2, len(data.rows) - room))
        for row in data.rows[first : first + room]:
            rows.append(layer_line(row, row.router == data.cursor, width, bool(unit)))
        if not data.rows:
            rows.append((("no layer with a near tie: n shows all", "dim"),))
        return rows

    def _strip(self, row: Row) -> Strip:
        """Pens `w0` to `w7` shade a weight."""
        pens = self.pens
        spans = []
        for text, pen in row:
            shaded = len(pen) == 2 and pen[0] == "w"
            spans.append(Segment(text, pens.load_soft[int(pen[1])] if shaded else pens.style[pen]))
        return Strip(spans).adjust_cell_length(self.size.width, pens.style["text"])


def layer_line(row: token_view.LayerRow, here: bool, width: int, alike: bool) -> Row:
    """`▸ 17   0.731    1.90   0.001≈  6  E062 .21 …`; each margin with its unit, but where all
    are `alike` and the heading says it."""
    kept = "─" if row.kept is None else str(row.kept)
    spans: list[Span] = [
        (f"{'▸' if here else ' '} {row.label:>4}  ", "accent" if here else "strong"),
        (f"{number(row.score_sum):>6}", "wrong" if row.sum_wrong else "text"),
        (WRONG if row.sum_wrong else " ", "wrong"),
        (f" {number(row.entropy, 2):>7}  ", "text"),
        (f"{gap(row.margin):>7}", "warn" if row.near_tie else "text"),
        ("" if alike else f" {row.margin_unit}", "dim"),
        ("≈" if row.near_tie else " ", "warn"),
        (f" {kept:>4} ", "dim"),
    ]
    used = sum(cells(text) for text, _ in spans)
    for expert, weight in row.picks:
        item = f" E{expert:03d} {number(weight, 2).lstrip('0')} "
        if used + cells(item) + 1 > width:
            spans.append((" …", "dim"))
            break
        spans += [(" ", "text"), (item, f"w{quantise(2 * (weight or 0.0))}")]
        used += cells(item) + 1
    if row.runner_up >= 0 and used + 12 <= width:
        spans.append((f"  next E{row.runner_up:03d}", "dim"))
    return tuple(spans)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreBars:
    """Every expert's score in one router. `scores` None: no logits were recorded."""

    title: str
    scores: NDArray[np.float64] | None  # [E]
    picked: frozenset[int]
    cut_at: float | None  # the lowest chosen score


class BarsPanel(Panel[ScoreBars]):
    """Scores as columns; chosen experts stand out, the cut is written."""

    DEFAULT_CSS = "BarsPanel { height: 1fr; border: round $border-blurred; }"

    def labels(self, data: ScoreBars) -> tuple[str, str]:
        note = "" if data.cut_at is None else f"lowest chosen {number(data.cut_at)}"
        return data.title, note

    def draw(self, data: ScoreBars, width: int, height: int) -> Sequence[Row]:
        if data.scores is None:
            return ((("router logits were not recorded", "dim"),),)
        return score_rows(data.scores, data.picked, width, max(1, height - 1))


def score_rows(
    scores: NDArray[np.float64], picked: frozenset[int], width: int, height: int
) -> list[Row]:
    """Columns of eighths, as wide as fits; several experts share one where there are too many."""
    experts = len(scores)
    share = -(-experts // max(1, width))
    wide = max(1, min(4, width // experts))
    top = float(np.nanmax(scores)) if np.isfinite(scores).any() else 1.0
    columns = []
    for first in range(0, experts, share):
        group = range(first, min(experts, first + share))
        value = max((float(scores[e]) for e in group if np.isfinite(scores[e])), default=0.0)
        eighths = round(value / top * height * 8) if top > 0 else 0
        columns.append((eighths, "accent" if picked & set(group) else "dim"))
    rows: list[Row] = []
    for level in range(height - 1, -1, -1):
        spans: list[Span] = []
        for eighths, pen in columns:
            filled = min(8, max(0, eighths - 8 * level))
            glyph = BARS[filled - 1] if filled else " "
            spans.append((glyph * max(1, wide - 1) + " " * (wide > 1), pen))
        rows.append(tuple(spans))
    ruler = [" "] * (len(columns) * wide)
    for expert in range(0, experts, max(1, -(-8 * share // wide))):
        at = expert // share * wide
        if at + 3 <= len(ruler):
            ruler[at : at + len(str(expert))] = str(expert)
    rows.append((("".join(ruler), "dim"),))
    return rows


class TokenScreen(ModalScreen[None]):
    """Layer by layer, for the token the main screen looks at."""

    KEYS = "token"
    BINDINGS = keys.bindings("token")
    AUTO_FOCUS = ""

    def __init__(self, look: Looking) -> None:
        super().__init__()
        self.look = look
        self.sort = "layer"
        self.ties_only = False

    def compose(self) -> ComposeResult:
        with Vertical(id="drill"):
            yield LayersTable(id="layers")
            yield BarsPanel(id="bars")
        yield KeyLine()

    def on_mount(self) -> None:
        self.draw()

    def on_resize(self) -> None:
        self.draw()

    def rows(self) -> list[token_view.LayerRow]:
        lane, row, table, decision = (
            self.look.lane,
            self.look.at,
            self.look.table,
            self.look.decision(),
        )
        if lane is None or table is None or decision is None:
            return []
        return token_view.arranged(
            token_view.layer_rows(table, lane, row, decision), self.sort, self.ties_only
        )

    def draw(self) -> None:
        look, table, lane, row = self.look, self.look.table, self.look.lane, self.look.at
        decision = look.decision()
        if lane is None or table is None or decision is None:
            return
        logprob = float(lane.logprob[row])
        chance = "" if np.isnan(logprob) else f"   p {np.exp(logprob):.3f}"
        title = f"token {int(lane.position[row])} {quoted(self.text())}{chance}"
        order = f"by {self.sort}" + (" · near ties only" if self.ties_only else "")
        box = self.query_one("#drill")
        table_rows = table.count + 2
        room = max(4, self.size.height * 92 // 100 - 4 - BARS_HEIGHT)
        self.query_one(LayersTable).styles.height = min(table_rows, room)
        box.border_title, box.border_subtitle = printable(title), f"{decision.basis} · {order}"
        rows = tuple(self.rows())
        self.query_one(LayersTable).show(TokenTable(title, order, rows, look.router, self.sort))
        self.query_one(BarsPanel).show(self.bars())

    def bars(self) -> ScoreBars:
        look, table, lane, row = self.look, self.look.table, self.look.lane, self.look.at
        decision, history = look.decision(), look.watch.history
        assert table is not None and lane is not None and history is not None
        assert decision is not None
        logits = history.logits(lane, row)
        experts = int(table.num_experts[look.router])
        ids = frozenset(int(e) for e in decision.expert_ids[look.router] if e >= 0)
        scores = None
        if logits is not None:
            spec = table.specs[look.router]
            scores = token_view.all_scores(logits[look.router, :experts], spec)
        cut_at = min((float(scores[e]) for e in ids), default=None) if scores is not None else None
        label = table.labels[look.router]
        return ScoreBars(f"L{label}: scores of all {experts} experts", scores, ids, cut_at)

    def text(self) -> str:
        lane, row, history = self.look.lane, self.look.at, self.look.watch.history
        if lane is None or history is None or row < 0:
            return ""
        return lane.texts[row] or history.pieces.get(int(lane.token_id[row]), "")

    def action_token(self, by: int) -> None:
        self.look.move_token(by)
        self.draw()

    def action_layer(self, by: int) -> None:
        shown = [row.router for row in self.rows()]
        if shown:
            at = shown.index(self.look.router) if self.look.router in shown else 0
            self.look.router = shown[max(0, min(len(shown) - 1, at + by))]
        self.draw()

    def action_sort(self) -> None:
        names = list(token_view.SORTS)
        self.sort = names[(names.index(self.sort) + 1) % len(names)]
        self.draw()

    def action_ties(self) -> None:
        self.ties_only = not self.ties_only
        self.draw()

    def action_shown(self, by: int) -> None:
        self.look.next_shown(by)
        self.draw()

    def action_copy(self) -> None:
        lane, table, decision = self.look.lane, self.look.table, self.look.decision()
        if lane is None or table is None or decision is None:
            return
        row = self.look.at
        variant = self.look.shown or lane.variants[row]
        self.app.copy_to_clipboard(
            token_view.as_json(table, lane, row, decision, variant, self.text())
        )
        self.notify("copied this token as JSON", timeout=3)

    def action_leave(self) -> None:
        self.dismiss(None)
