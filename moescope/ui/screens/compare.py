"""Two lanes side by side: texts with the point where they part, experts that differ, agreement.

News come from the main screen's own loop, so pausing and pace work the same; this only draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer

from moescope.engine import protocol as p
from moescope.ui import compare_view, keys, view
from moescope.ui.cells import Cells
from moescope.ui.compare_view import MODES, Pair
from moescope.ui.history import Lane
from moescope.ui.panels import TranscriptData
from moescope.ui.routers import TRAINED
from moescope.ui.screens.dialogs import AskScreen
from moescope.ui.widgets.agreement_panel import AgreementPanel
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.score_plot import ScorePlot
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from moescope.ui.screens.main import MainScreen

EMPTY = TranscriptData((), None, True, 0, "waiting for its first token")


class CompareScreen(Screen[None]):
    """Lanes by number, variants by letter."""

    KEYS = "compare"
    BINDINGS = keys.bindings("compare")
    AUTO_FOCUS = ""

    def __init__(self, main: MainScreen) -> None:
        super().__init__()
        self.main = main
        self.subject, self.look = main.subject, main.look
        self.shown = (0, 1)
        self.mode = "xor"
        self.pair: Pair | None = None
        self._cells = (Cells(), Cells())
        self._drawn: object = None
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield StatusLine(id="status")
        with Horizontal(id="lanes"):
            yield Transcript(id="text-a")
            yield Transcript(id="text-b")
        with Horizontal(id="between"):
            yield ExpertMap(id="map")
            yield AgreementPanel(id="agreement")
        yield ScorePlot(id="divergence")
        yield Footer()

    def on_mount(self) -> None:
        numbers = self.numbers()
        if len(numbers) > 1:
            self.shown = (numbers[0], numbers[1])
        self._timer = self.set_interval(1 / self.main.clock.rate, self.tick)
        self.draw()

    def on_resize(self) -> None:
        self.set_class(self.size.width < 104 or self.size.height < 30, "-column")
        self._drawn = None

    def tick(self) -> None:
        self.main.news()
        self.draw()

    def numbers(self) -> list[int]:
        """Lanes that are open or hold tokens."""
        held = self.subject.history.lane_numbers() if self.subject.history is not None else []
        opened = () if self.subject.mode == "replay" else self.subject.lanes
        return sorted({*held, *opened})

    def lanes(self) -> tuple[Lane | None, Lane | None]:
        history = self.subject.history
        if history is None:
            return None, None
        return history.lane(self.shown[0]), history.lane(self.shown[1])

    # --- drawing

    def draw(self) -> None:
        if not self.is_mounted:
            return
        self.query_one(StatusLine).show(self.main.status())
        a, b = self.lanes()
        table = self.subject.table
        if table is None:
            return
        if (
            a is not None
            and b is not None
            and (self.pair is None or self.pair.a is not a or self.pair.b is not b)
        ):
            self.pair, self._drawn = Pair(table, a, b), None
        parting = None
        if self.pair is not None and a is not None and b is not None:
            self.pair.feed()
            parting = self.pair.comparison.ids_part_at
        for side, lane in enumerate((a, b)):
            self._draw_text(side, lane, parting)
        if self.pair is not None and self.pair.rows and a is not None and b is not None:
            self._draw_pair(self.pair)

    def _draw_text(self, side: int, lane: Lane | None, parting: int | None) -> None:
        panel = self.query_one(("#text-a", "#text-b")[side], Transcript)
        assert self.subject.table is not None and self.subject.history is not None
        if lane is None or not lane.count:
            panel.show(EMPTY)
            return
        row = min(self.look.at if self.look.row is not None else lane.count - 1, lane.count - 1)
        panel.show(
            self._cells[side].data(
                self.subject.history,
                self.subject.table,
                lane,
                self.look.router,
                self.look.tint,
                row,
                self.look.row is None,
                subtitle=f"lane {lane.lane + 1}",
                title=self.title_of(side, lane),
                parting=-1 if parting is None else parting,
            )
        )

    def title_of(self, side: int, lane: Lane) -> str:
        expression = lane.variants[-1] if lane.variants else TRAINED
        table = self.subject.table
        assert table is not None
        return f"{'AB'[side]}  {view.title_of(table, expression)}"

    def _draw_pair(self, pair: Pair) -> None:
        row = max(0, min(self.look.at, pair.rows - 1))
        key = (id(pair), pair.rows, row, self.look.router, self.look.expert, self.mode)
        if key == self._drawn:
            return
        self._drawn = key
        self.query_one(ExpertMap).show(
            compare_view.difference_map(pair, row, self.mode, self.look.cursor)
        )
        self.query_one(AgreementPanel).show(compare_view.agreement(pair, row))
        self.query_one(ScorePlot).show(compare_view.divergence(pair, row))

    # --- keys

    def action_pause(self) -> None:
        self.main.action_pause()

    def action_stop(self) -> None:
        self.main.action_stop()

    def action_rerun(self) -> None:
        self.main.action_rerun(False)

    def action_follow(self) -> None:
        self.main.action_follow()
        self.draw()

    def action_token(self, by: int) -> None:
        self.main.action_token(by)
        self.draw()

    def action_layer(self, by: int) -> None:
        self.look.move_router(by)
        self.draw()

    def action_difference(self, by: int) -> None:
        at = None
        if self.pair is not None:
            at = compare_view.next_difference(self.pair, self.look.at, by)
        if at is None:
            self.notify("no further difference", timeout=3)
        else:
            self.look.seek(at)
        self.draw()

    def action_swap(self) -> None:
        self.shown = (self.shown[1], self.shown[0])
        self.draw()

    def action_other(self) -> None:
        others = [n for n in self.numbers() if n != self.shown[0]]
        if others:
            later = [n for n in others if n > self.shown[1]]
            self.shown = (self.shown[0], later[0] if later else others[0])
        self.draw()

    def action_mode(self) -> None:
        self.mode = MODES[(MODES.index(self.mode) + 1) % len(MODES)]
        self.draw()

    def action_add_lane(self) -> None:
        if len(self.subject.lanes) >= p.MAX_LANES or self.subject.mode == "replay":
            self.notify("no further lane can be opened here", timeout=4)
            return
        hint = "a variant: num_experts_per_tok=4   always_renormalised"
        self.app.push_screen(AskScreen("lane", hint, check=self.look.add_variant), self._add)

    def _add(self, expression: str | None) -> None:
        if expression is not None:
            self.subject.send(p.AddLane(expression))
            self.main.action_rerun(False)

    def action_leave(self) -> None:
        self.dismiss(None)
