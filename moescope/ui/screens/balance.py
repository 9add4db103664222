"""How evenly the lane on the main screen uses its experts: measures, losses, loads of one layer.

A modal that moves the main screen's cursor and keeps counting while tokens come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.timer import Timer

from moescope.ui import balance_view, keys
from moescope.ui.balance_view import BalanceData, BalanceRow, Tally
from moescope.ui.ramp import BARS
from moescope.ui.text import cells, cut, fit
from moescope.ui.widgets.key_line import KeyLine
from moescope.ui.widgets.panel import Panel, Row

if TYPE_CHECKING:
    from moescope.ui.screens.main import MainScreen

LABEL = 18
COLUMNS = (("this layer", 12), ("median", 9), ("worst layer", 14), ("even", 7), ("chance", 11))
BARS_ROWS = 6  # left to the loads, at least


class MeasuresPanel(Panel[BalanceData]):
    """Measures as rows, what is said about them below."""

    DEFAULT_CSS = "MeasuresPanel { border: none; height: auto; }"
    EMPTY = "waiting for the first token"

    def draw(self, data: BalanceData, width: int, height: int) -> Sequence[Row]:
        narrow = width < LABEL + sum(size for _, size in COLUMNS)
        head = "".join(fit(title, size, ">") for title, size in _columns(narrow))
        rows: list[Row] = [((" " * LABEL + head, "dim"),)]
        rows += [measure_row(row, narrow) for row in data.rows]
        rows += [()] if len(rows) + len(data.lines) < height else []
        for label, text in data.lines:
            rows.append(((fit(label, LABEL), "dim"), (whole_items(text, width - LABEL), "text")))
        return rows


def whole_items(text: str, width: int) -> str:
    """`text` without the items, two spaces apart, that would be cut."""
    kept = text.split("  ")
    while len(kept) > 1 and cells("  ".join(kept)) > width:
        kept.pop()
    return cut("  ".join(kept), width)


def _columns(narrow: bool) -> list[tuple[str, int]]:
    return [(title, size) for title, size in COLUMNS if not (narrow and title == "median")]


def measure_row(row: BalanceRow, narrow: bool) -> Row:
    values = (row.here, row.median, row.worst, row.even, row.chance)
    shown = dict(zip((title for title, _ in COLUMNS), values, strict=True))
    spans = [(fit(row.label, LABEL), "text")]
    for title, size in _columns(narrow):
        pen = {"this layer": "strong", "even": "dim", "chance": "dim"}.get(title, "text")
        spans.append((fit(shown[title], size, ">"), pen))
    if row.noise:
        spans.append(("  ≈ chance", "warn"))
    return tuple(spans)


class LoadPanel(Panel[BalanceData]):
    """Loads as columns; the experts of the token under the cursor stand out."""

    DEFAULT_CSS = "LoadPanel { border: round $border-blurred; height: 1fr; }"

    def labels(self, data: BalanceData) -> tuple[str, str]:
        most = int(data.load.max(initial=0))
        return data.load_title, f"┈ even {data.fair:.1f}   most {most}   ▴ this token"

    def draw(self, data: BalanceData, width: int, height: int) -> Sequence[Row]:
        return load_rows(data, width, max(2, height))


def load_rows(data: BalanceData, width: int, height: int) -> list[Row]:
    """Columns of eighths, the even share as a dotted line; below, who was picked, and numbers where
    there is room. Several experts share a column where there are too many: the busiest counts."""
    experts = len(data.load)
    share = -(-experts // max(1, width))
    wide = max(1, min(6, width // max(1, experts)))
    groups = [range(at, min(experts, at + share)) for at in range(0, experts, share)]
    picked = [bool(data.picked & set(group)) for group in groups]
    numbered = height >= 6
    room = height - 1 - numbered
    top = max(int(data.load.max(initial=0)), 1)
    heights = [round(int(data.load[list(group)].max()) / top * room * 8) for group in groups]
    even = min(room - 1, int(data.fair / top * room))
    rows: list[Row] = []
    for level in range(room - 1, -1, -1):
        blank = "┈" if level == even else " "
        spans: list[tuple[str, str]] = []
        for eighths, chosen in zip(heights, picked, strict=True):
            filled = min(8, max(0, eighths - 8 * level))
            bar = (BARS[filled - 1] if filled else blank) * max(1, wide - 1)
            pen = "accent" if chosen else "text"
            spans += [(bar, pen if filled else "dim"), (blank * (wide > 1), "dim")]
        rows.append(tuple(spans))
    marks = "".join(fit("▴" if chosen else "", wide, "^") for chosen in picked)
    rows.append(((marks, "accent"),))
    return [*rows, ruler(groups, wide)] if numbered else rows


def ruler(groups: Sequence[range], wide: int) -> Row:
    """The number of every few columns' first expert."""
    line = [" "] * (len(groups) * wide)
    for at in range(0, len(groups), max(1, -(-8 // wide))):
        label = str(groups[at][0])
        if at * wide + len(label) <= len(line):
            line[at * wide : at * wide + len(label)] = label
    return (("".join(line), "dim"),)


class BalanceScreen(ModalScreen[None]):
    """See the file's docstring."""

    KEYS = "balance"
    BINDINGS = keys.bindings("balance")
    AUTO_FOCUS = ""

    def __init__(self, main: MainScreen) -> None:
        super().__init__()
        self.main, self.look = main, main.look
        self.tally: Tally | None = None
        self._drawn: object = None
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        with Vertical(id="drill"):
            yield MeasuresPanel(id="measures")
            yield LoadPanel(id="loads")
        yield KeyLine()

    def on_mount(self) -> None:
        self._timer = self.set_interval(1 / self.main.clock.rate, self.tick)
        self.draw()

    def on_resize(self) -> None:
        self._drawn = None
        self.draw()

    def tick(self) -> None:
        self.main.news()
        self.draw()

    def draw(self) -> None:
        lane, table = self.look.lane, self.look.table
        history = self.main.subject.history
        if lane is None or table is None or history is None or not lane.count:
            return
        if self.tally is None or self.tally.lane is not lane:
            self.tally = Tally(lane, table.widest)
        self.tally.feed()
        key = (lane, self.tally.rows, self.look.router, self.look.at, self.size)
        if key == self._drawn:
            return
        self._drawn = key
        data = balance_view.balance_data(table, history, self.tally, self.look.router, self.look.at)
        box = self.query_one("#drill")
        box.border_title, box.border_subtitle = data.title, data.note
        panel = self.query_one(MeasuresPanel)
        wanted = len(data.rows) + len(data.lines) + 3
        panel.styles.height = max(4, min(wanted, self.size.height * 92 // 100 - 3 - BARS_ROWS))
        panel.show(data)
        self.query_one(LoadPanel).show(data)

    def action_layer(self, by: int) -> None:
        self.look.move_router(by)
        self.draw()

    def action_token(self, by: int) -> None:
        self.main.action_token(by)
        self.draw()

    def action_pause(self) -> None:
        self.main.action_pause()

    def action_lane(self) -> None:
        self.main.action_lane()
        self.draw()

    def action_leave(self) -> None:
        self.dismiss(None)
