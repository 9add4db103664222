"""Two lanes of up to eight side by side: texts with the point where they part, experts that differ,
layer by layer why and by how much, and how far they agree.

News come from the main screen's own loop, so pausing and pace work the same; this only draws. What
keys do is in `CompareKeys`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.timer import Timer
from textual.widgets import Footer

from moescope.ui import compare_layers, compare_view, view
from moescope.ui.cells import Cells
from moescope.ui.compare_room import ALL, TEXT_ROWS, Room, room_for
from moescope.ui.compare_view import FED_ALIKE, FREE, Pair
from moescope.ui.history import Lane
from moescope.ui.panels import TranscriptData
from moescope.ui.routers import TRAINED, RouterTable
from moescope.ui.screens.compare_keys import CompareKeys
from moescope.ui.widgets.agreement_panel import AgreementPanel
from moescope.ui.widgets.compare_panels import GatePanel, LanesBar, LayersPanel
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.score_plot import ScorePlot
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from moescope.ui.screens.main import MainScreen

EMPTY = TranscriptData((), None, True, 0, "waiting for its first token")
UNASKED = TranscriptData((), None, True, 0, "press i to type a prompt for all lanes")
ASIDE = 64  # tokens of a lane that is not shown, compared in one beat


class CompareScreen(CompareKeys):
    """Lanes by letter; `shown` are the two whose texts stand there."""

    AUTO_FOCUS = ""

    def __init__(self, main: MainScreen) -> None:
        super().__init__()
        self.main = main
        self.subject, self.look = main.subject, main.look
        self.shown = (0, 1)
        self.view = ""  # of the room's; the first there is room for
        self.pairs: dict[tuple[int, int], Pair] = {}
        self._whys: dict[tuple[object, int], dict[int, str]] = {}
        self._cells = (Cells(), Cells())
        self._drawn: object = None
        self._turn = 0  # which of the other lanes is compared next
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield StatusLine(id="status")
        yield LanesBar(id="lanes-bar")
        with Horizontal(id="lanes"):
            yield Transcript(id="text-a")
            yield Transcript(id="text-b")
        with Horizontal(id="between"):
            yield ExpertMap(id="map")
            yield LayersPanel(id="layers")
            yield GatePanel(id="gate")
            yield AgreementPanel(id="agreement")
        yield ScorePlot(id="divergence")
        yield Footer()

    def on_mount(self) -> None:
        numbers = self.numbers()
        if len(numbers) > 1:
            self.shown = (numbers[0], numbers[1])
        self._timer = self.set_interval(1 / self.main.clock.rate, self.tick)
        self.place()
        self.draw()

    def on_resize(self) -> None:
        self.place()
        self._drawn = None

    @property
    def room(self) -> Room:
        table = self.subject.table
        routers = table.count if table is not None else 0
        return room_for(self.size.width, self.size.height, routers, len(self.subject.tables) > 1)

    def place(self) -> None:
        """Give panels their room: those of this view, and those that always stand here."""
        room = self.room
        if self.view not in room.views:
            self.view = room.views[0]
        shown = room.panels(self.view)
        for name in ALL:
            self.query_one(f"#{name}").display = name in shown
        self.set_class(room.column, "-column")
        self.query_one("#divergence").display = room.plot
        self.query_one("#between").styles.height = "1fr" if room.column else room.between
        self.query_one("#lanes").styles.height = TEXT_ROWS if room.column else "2fr"
        footer = self.query_one(Footer)
        footer.compact = room.column
        footer.show_command_palette = not room.column

    def tick(self) -> None:
        self.main.news()
        self.draw()

    # --- lanes

    def numbers(self) -> list[int]:
        """Lanes that are open or hold tokens."""
        held = self.subject.history.lane_numbers() if self.subject.history is not None else []
        opened = () if self.subject.mode == "replay" else self.subject.lanes
        return sorted({*held, *opened})

    def lane(self, number: int) -> Lane | None:
        history = self.subject.history
        return history.lane(number) if history is not None else None

    def table_of(self, number: int) -> RouterTable:
        """The routers of a lane's model, also of a lane that holds nothing yet."""
        history, tables = self.subject.history, self.subject.tables
        lane = self.lane(number)
        placed = 0 if history is None else history.models.get(number, 0)
        return tables[min(placed if lane is None else lane.model, len(tables) - 1)]

    def lanes(self) -> tuple[Lane | None, Lane | None]:
        return self.lane(self.shown[0]), self.lane(self.shown[1])

    def pair_of(self, a: int, b: int) -> Pair | None:
        """The comparison of two lanes, begun where there is none; None while one is empty."""
        one, other = self.lane(a), self.lane(b)
        if one is None or other is None or not one.count or not other.count:
            return None
        held = self.pairs.get((a, b))
        if held is None or held.a is not one or held.b is not other:
            tables = self.subject.table_for(one), self.subject.table_for(other)
            assert tables[0] is not None
            held = self.pairs[a, b] = Pair(tables[0], one, other, tables[1])
        return held

    @property
    def pair(self) -> Pair | None:
        """The comparison of the two lanes that are shown."""
        return self.pair_of(*self.shown)

    def _compare(self) -> None:
        """Take what came: of the shown lanes all there is room for, of one other lane a little."""
        if (pair := self.pair) is not None:
            pair.feed()
        numbers = self.numbers()
        others = [n for n in numbers[1:] if (numbers[0], n) != self.shown]
        if others:
            self._turn = (self._turn + 1) % len(others)
            aside = self.pair_of(numbers[0], others[self._turn])
            if aside is not None:
                aside.feed(ASIDE)

    # --- drawing

    def draw(self) -> None:
        if not self.is_mounted:
            return
        self.query_one(StatusLine).show(self.main.status())
        table, history = self.subject.table, self.subject.history
        if table is None or history is None:
            return
        self._compare()
        pair = self.pair
        parting = pair.comparison.ids_part_at if pair is not None else None
        for side, lane in enumerate(self.lanes()):
            self._draw_text(side, lane, parting)
        self._draw_lanes()
        if pair is not None and pair.rows:
            self._draw_pair(pair)

    def _draw_lanes(self) -> None:
        numbers = self.numbers()
        expressions = {}
        for number in numbers:
            lane = self.lane(number)
            held = lane.variants[-1] if lane is not None and lane.variants else TRAINED
            table = self.table_of(number)
            expressions[number] = table, self.subject.lanes.get(number, held)
        pairs = {n: pair for n in numbers[1:] if (pair := self.pair_of(numbers[0], n)) is not None}
        self.query_one(LanesBar).show(
            compare_layers.lanes_data(expressions, pairs, self.shown, self.mode())
        )

    def mode(self) -> str:
        """Whether lanes are fed the same tokens, in the words that label it everywhere."""
        pair = self.pair
        if self.subject.mode != "replay":
            return FED_ALIKE if self.subject.same_tokens else FREE
        return FED_ALIKE if pair is not None and pair.fed_alike else FREE

    def _draw_text(self, side: int, lane: Lane | None, parting: int | None) -> None:
        panel = self.query_one(("#text-a", "#text-b")[side], Transcript)
        assert self.subject.history is not None
        if lane is None or not lane.count:
            asked = self.subject.generate is not None or self.subject.mode == "replay"
            panel.show(EMPTY if asked else UNASKED)
            return
        row = min(self.look.at if self.look.row is not None else lane.count - 1, lane.count - 1)
        first = view.LETTERS[self.numbers()[0]]
        fed = self.mode() == FED_ALIKE and view.LETTERS[lane.lane] != first
        panel.show(
            self._cells[side].data(
                self.subject.history,
                self.table_of(lane.lane),
                lane,
                self.look.router,
                self.look.tint,
                row,
                self.look.row is None,
                subtitle=f"fed {first}'s text" if fed else "its own text",
                title=self.title_of(lane),
                parting=-1 if parting is None else parting,
            )
        )

    def title_of(self, lane: Lane) -> str:
        expression = lane.variants[-1] if lane.variants else TRAINED
        table = self.table_of(lane.lane)
        model = f"{table.model} · " if table.model else ""
        return f"{view.LETTERS[lane.lane]}  {model}{view.title_of(table, expression)}"

    def _draw_pair(self, pair: Pair) -> None:
        row = max(0, min(self.look.at, pair.rows - 1))
        settled = self._tells_now(pair) or not (self.subject.live or self.main.playing)
        key = (id(pair), pair.rows, row, self.look.router, self.look.expert, self.view, settled)
        if key == self._drawn:
            return
        self._drawn = key
        found = pair.comparison.first_divergence
        why, note = "", "no flip on the same tokens"
        if found is not None:
            at = pair.a.row_of(found.position)
            why = self._causes(pair, at).get(found.router, "") if settled and at is not None else ""
            note = (
                f"first ≠ @{found.position} L{found.layer:02d} {compare_view.margin_of(found)} · g"
            )
        mode = self.view if self.view in compare_view.MODES else "xor"
        if self.query_one("#map").display:
            chart = compare_view.difference_map(pair, row, mode, self.look.cursor)
            self.query_one(ExpertMap).show(chart)
        if self.query_one("#layers").display:
            whys = self._causes(pair, row) if settled else {}
            self.query_one(LayersPanel).show(
                compare_layers.layers_data(pair, row, self.look.router, whys, note)
            )
        if self.query_one("#gate").display:
            self.query_one(GatePanel).show(self._gate(pair))
        self.query_one(AgreementPanel).show(compare_view.agreement(pair, row, why, self.mode()))
        if self.query_one("#divergence").display:
            self.query_one(ScorePlot).show(compare_view.divergence(pair, row))

    def _tells_now(self, pair: Pair) -> bool:
        """Whether causes are in memory; else they are read once nothing moves."""
        history = self.subject.history
        told = history is not None and history.flips.tells(pair.b.sequence, pair.b.lane)
        return told and not pair.a.lane

    def _gate(self, pair: Pair) -> compare_layers.GateData:
        history = self.subject.history
        assert history is not None
        found = history.flips.rows(pair.b.sequence, pair.b.lane) if not pair.a.lane else None
        return compare_layers.gate_data(pair, found, self.mode() == FED_ALIKE)

    def _causes(self, pair: Pair, row: int) -> dict[int, str]:
        """Why routers chose otherwise at `row`; remembered, as logits are read from the trace."""
        key = (pair.a, pair.b), row
        history = self.subject.history
        assert history is not None
        if key not in self._whys:
            if len(self._whys) > 256:
                self._whys.clear()
            self._whys[key] = compare_layers.causes_at(pair.table, history, pair.a, pair.b, row)
        return self._whys[key]
