"""The main screen: map, layer, sums, text and token of one lane, live or replayed.

It asks `Watch` for news at the clock's pace and hands each panel its data from `view.py`; where the
cursor is lives in `Looking`, what keys do in `MainKeys`, how panels look in their widgets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.geometry import Size
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Input, Label, Static

from moescope.engine import protocol as p
from moescope.safety import printable
from moescope.ui import arrange, lines, routers, view
from moescope.ui.cells import Cells
from moescope.ui.clock import Clock
from moescope.ui.history import Lane
from moescope.ui.looking import Looking
from moescope.ui.pace import BASE, FULL, Meter, Pace
from moescope.ui.panels import StatusData, TransportData
from moescope.ui.screens.main_keys import MainKeys
from moescope.ui.tour import Tour
from moescope.ui.watch import Watch
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.key_line import KeyLine
from moescope.ui.widgets.layer_line import LayerLine
from moescope.ui.widgets.layer_panel import LayerPanel
from moescope.ui.widgets.loading_panel import LoadingPanel
from moescope.ui.widgets.score_plot import ScorePlot
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.token_panel import TokenPanel
from moescope.ui.widgets.transcript import Transcript
from moescope.ui.widgets.transport import Transport
from moescope.ui.widgets.variant_bar import VariantBar

PLOT_EVERY = 0.5  # seconds, while tokens come
DEMO_PACE = 16.0  # tokens a second: the embedded model is faster than anybody reads
CHROME = 4  # rows of status, variants, prompt and footer
PLACEHOLDER = "press i to type a prompt · / finds L17, E062, @412 or text"


class MainScreen(MainKeys):
    """See the file's docstring."""

    AUTO_FOCUS = ""

    def __init__(self, watch: Watch, now: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.subject = watch
        self.look = Looking(watch)
        self.pace = Pace()
        self.playing = False
        self.tour: Tour | None = None  # what the demo does until a key is pressed
        self.clock = Clock(os.cpu_count() or 1)
        self.now = now or time.monotonic
        self._cells = Cells()
        self._drawn: dict[str, object] = {}  # panel -> what it was drawn from
        self._plotted = 0.0
        self._layers: list[LayerPanel] = []
        self._plots: list[ScorePlot] = []
        self._stepped: tuple[object, int] = (None, 0)  # lane and the rows it will have
        self._meter, self._rate = Meter(), 0.0  # how fast tokens come where a pace is set
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield StatusLine(id="status")
        yield LoadingPanel(id="loading")
        yield Static("", id="failed", markup=False)
        yield Static("", id="small", markup=False)
        with Horizontal(id="work"):
            with Vertical(id="left"):
                yield ExpertMap(id="map")
                yield LayerPanel(id="layer")
                yield LayerLine(id="line")
                yield ScorePlot(id="sums")
            with Vertical(id="right"):
                yield Transcript(id="text")
                yield LayerPanel(id="layer-right")
                yield TokenPanel(id="token")
                yield ScorePlot(id="sums-right")
        yield VariantBar(id="variants")
        yield Transport(id="transport")
        with Horizontal(id="ask"):
            yield Label(">", id="sign")
            yield Input(placeholder=PLACEHOLDER, id="prompt", compact=True)
            yield Label("", id="chat", markup=False)
        yield KeyLine()

    def on_mount(self) -> None:
        self._layers, self._plots = list(self.query(LayerPanel)), list(self.query(ScorePlot))
        self._fit(self.size)
        self.look_at(self.subject)

    # --- the clock

    def _start_clock(self) -> None:
        if self._timer is not None:
            self._timer.stop()
        self.clock.rest()
        self._timer = self.set_interval(1 / self.clock.rate, self.tick)

    def tick(self) -> None:
        """One beat: take the news, draw what changed."""
        self.news()
        self.draw()

    def news(self) -> None:
        """Take what arrived and move what plays; screens over this one call it too."""
        now = self.now()
        if self.clock.beat(now) and self.is_current:
            self._start_clock()
        was_ready, had_failed = self.subject.table is not None, self.subject.failed
        self.subject.pump()
        if self.subject.table is not None and not was_ready:
            self._ready()
        self._play(now)
        prompt = self.tour.next(now, self.subject.resting) if self.tour is not None else None
        if prompt is not None:
            self.ask(prompt)
        self._say()
        if self.subject.failed is not had_failed:
            self.refresh_bindings()

    def _play(self, now: float) -> None:
        """Advance by what the pace owes: rows of a replay, steps of a live run."""
        self._rate = self._meter.rate(now, self.look.at + 1)
        if not self.playing:
            return
        lane = self.look.lane
        if self.subject.mode == "replay":
            due = self.pace.due(now)
            if lane is not None and due:
                self.look.seek(self.look.at + due)
                self.playing = self.look.at < lane.count - 1
        elif self.subject.mode == "paused" and lane is not None:
            come = self._stepped[0] is not lane or lane.count >= self._stepped[1]
            due = self.pace.due(now) if come else 0
            if due:
                self.subject.send(p.Step(due))
                self._stepped = (lane, lane.count + due)
        elif self.subject.mode == "idle" and self.subject.finished:
            self.playing = False

    def _say(self) -> None:
        notes, self.subject.notes[:] = list(self.subject.notes), []
        for note in notes:
            severity = {"error": "error", "warning": "warning"}.get(note.kind, "information")
            self.say(note.text, severity)

    def on_app_blur(self) -> None:
        self.clock.away = True
        self._start_clock()

    def on_app_focus(self) -> None:
        self.clock.away = False
        self._start_clock()

    def on_screen_suspend(self) -> None:
        """Covered by another screen: it asks for the news itself, if it wants them."""
        if self._timer is not None:
            self._timer.pause()

    def on_screen_resume(self) -> None:
        if self._timer is not None:
            self.clock.rest()
            self.pace.rest()
            self._timer.resume()
            self._drawn.clear()
            self.draw()

    # --- what is looked at

    def look_at(self, watch: Watch) -> None:
        """Show another engine or trace."""
        self.subject, self.look = watch, Looking(watch)
        self.pace, self.playing, self.tour = Pace(), False, None
        self._drawn, self._cells = {}, Cells()
        if self.maximized is not None:
            self.minimize()
        self._start_clock()
        watch.pump()
        if watch.table is not None:
            self._ready()
        self.call_later(self.refresh_bindings)  # once this screen is mounted
        self.draw()

    def _ready(self) -> None:
        """Routers are known now: lay out for them, and begin what begins by itself."""
        self.place()
        replay = self.subject.mode == "replay"
        if self.subject.facts.get("beside") and not replay:
            self.compare_two()
        if replay:
            self.pace, self.playing = Pace(BASE), True
            lane = self.look.lane
            if lane is not None and lane.count:
                decoding = [i for i in range(lane.count) if lane.phase[i]]
                self.look.row = decoding[0] if decoding else 0
        elif self.subject.opening:
            self.ask(self.subject.opening)
        elif self.subject.demo and self.subject.generate is None:
            self.pace, self.tour = Pace(DEMO_PACE), Tour()
        self.set_class(replay, "-replay")
        self.refresh_bindings()

    def on_key(self, event: events.Key) -> None:
        """Somebody is there: the demo no longer goes on by itself."""
        self.tour = None
        self.why_not(event.key)

    def on_mouse_down(self) -> None:
        self.tour = None

    def ask(self, prompt: str) -> None:
        """Generate from `prompt`, at the pace that is set."""
        self.subject.ask(prompt, paused=self.pace.rate is not FULL)
        line = printable(" ".join(prompt.split()), 200)
        self.query_one("#prompt", Input).placeholder = f"{line}  · i types another"
        self._begin()

    def _begin(self) -> None:
        self.playing = self.pace.rate is not FULL
        self.pace.rest()
        self._stepped = (None, 0)
        self.look.row = None

    # --- drawing

    def on_resize(self, event: events.Resize) -> None:
        if self._layers:  # else nothing is composed yet, and mounting fits
            self._fit(event.size)

    def _fit(self, size: Size) -> None:
        width, height = size
        too_small = width < arrange.NEEDS[0] or height < arrange.NEEDS[1]
        self.set_class(too_small, "-too-small")
        if too_small:
            needs = f"needs {arrange.NEEDS[0]}×{arrange.NEEDS[1]}, have {width}×{height}"
            self.query_one("#small", Static).update(needs)
        self.place()
        self._drawn.clear()

    def place(self) -> None:
        table = self.subject.table
        if table is None:
            return
        chart = self.query_one("#map", ExpertMap)
        chrome = CHROME + (self.subject.mode == "replay")
        place = arrange.arrange(
            self.query_one("#variants").size.width or self.size.width,
            max(1, self.size.height - chrome),
            table.count,
            table.widest,
            int(table.top_k.max(initial=1)),
            chart.zoom,
        )
        for kind in ("column", "two", "lone"):
            self.set_class(place.kind == kind, f"-{kind}")
        for name in ("layer", "sums", "token"):
            self.set_class(name in place.out, f"-out-{name}")
        self.query_one("#left").styles.width = place.left
        sizes: list[tuple[Widget, int]] = [(chart, place.map_height)]
        sizes += [(panel, place.layer_height) for panel in self.query(LayerPanel)]
        for panel, height in sizes:
            panel.styles.height = "1fr" if panel is self.maximized else height
        footer = self.query_one(KeyLine)
        footer.compact = place.kind == "column"
        footer.show_command_palette = not footer.compact

    def watch_maximized(self, before: Widget | None, now: Widget | None) -> None:
        """One panel on the whole screen, or none any more: heights are ours to give."""
        for panel, height in ((before, None), (now, "1fr")):
            if panel is not None:
                panel.styles.height = height
        self.place()

    @property
    def mode(self) -> lines.Mode:
        """What the status says: a run that is stepped at a pace is running."""
        mode: lines.Mode = self.subject.mode  # type: ignore[assignment]
        return "running" if mode == "paused" and self.playing else mode

    def draw(self) -> None:
        """Show everything that differs from what is shown."""
        if not self.is_mounted:
            return
        watch, look = self.subject, self.look
        self.set_class(watch.failed is not None, "-failed")
        self.set_class(watch.table is None and watch.failed is None, "-loading")
        lane, row = look.lane, look.at
        self.query_one(StatusLine).show(self.status())
        if watch.failed is not None and self._changed("failed", watch.failed):
            self.query_one("#failed", Static).update(lines.failure(watch.failed))
        if watch.table is None:
            self.query_one(LoadingPanel).show(watch.loading)
            return
        self._draw_bars()
        self._draw_text(lane, row)
        if lane is None or row < 0:
            if self._changed("token", (look.router, look.expert)):
                self.query_one(ExpertMap).show(view.empty_map(watch.table, look.cursor))
        else:
            self._draw_token(lane, row)

    def _changed(self, panel: str, source: object) -> bool:
        """Whether `panel` was drawn from something else; notes what it is drawn from now."""
        before = self._drawn.get(panel)
        self._drawn[panel] = source
        return before != source

    def status(self) -> StatusData:
        """The line on top, here and on the compare screen."""
        look, watch = self.look, self.subject
        moving = self.mode == "running" or (self.mode == "replay" and self.playing)
        rate = (self._rate if self.playing else watch.rate) if moving else 0.0
        return lines.status(
            watch, self.mode, rate, look.lane, look.at, look.address(), self.clock.measured
        )

    def _draw_bars(self) -> None:
        watch, look = self.subject, self.look
        assert watch.table is not None
        generating = look.generating()
        if self._changed("variants", (watch.variants, generating, look.shown)):
            self.query_one(VariantBar).show(
                view.variant_bar(watch.table, watch.variants, generating, look.shown)
            )
        template = bool(watch.facts.get("has_chat_template")) and watch.mode != "replay"
        chat = f" chat {'on' if watch.chat else 'off'} ^t " if template else ""
        if self._changed("chat", chat):
            label = self.query_one("#chat", Label)
            label.display = bool(chat)
            label.update(chat)
        if watch.mode == "replay":
            total = look.lane.count if look.lane is not None else 0
            self.query_one(Transport).show(
                TransportData(
                    max(0, look.at), total, self.playing, self.pace.speed, tuple(sorted(look.marks))
                )
            )

    def _draw_text(self, lane: Lane | None, row: int) -> None:
        assert self.look.table is not None and self.subject.history is not None
        follow = self.look.row is None
        count = lane.count if lane is not None else 0
        key = (lane, count, row, follow, self.look.router, self.look.tint, self.subject.mode)
        if not self._changed("text", key):
            return
        note = "follow" if follow else ""
        if lane is not None and row >= 0 and not follow:
            note = f"token {int(lane.position[row])}"
        elif not count and self.subject.problems:
            note = "no token could be read"
        elif self.subject.mode == "idle" and self.look.lane_number in self.subject.finished:
            note = lines.ended(self.subject.finished[self.look.lane_number])
        self.query_one(Transcript).show(
            self._cells.data(
                self.subject.history,
                self.look.table,
                lane,
                self.look.router,
                self.look.tint,
                row if row >= 0 else None,
                follow,
                note,
            )
        )

    def _draw_token(self, lane: Lane, row: int) -> None:
        watch, look, table = self.subject, self.look, self.look.table
        assert table is not None and watch.history is not None
        settled = not self.playing and not watch.live
        key = (lane, row, look.router, look.expert, look.shown, settled, watch.variants)
        if not self._changed("token", key):
            return
        decision = look.decision()
        assert decision is not None
        counts = view.load_counts(lane, row, table.widest)
        tokens = min(view.WINDOW, row + 1)
        self.query_one(ExpertMap).show(view.map_data(table, decision, counts, tokens, look.cursor))
        line = lines.spec_line(table, look.router, look.shown or lane.variants[row])
        data = view.layer_data(table, lane, row, decision, counts, look.cursor, line)
        for panel in self._layers:
            panel.show(data)
        self.query_one(LayerLine).show(data)
        now = self.now()
        if settled or now - self._plotted >= PLOT_EVERY or now < self._plotted:
            self._plotted = now
            if self._changed("sums", (lane, row, look.router)):
                plot = view.plot_data(table, lane, row, look.router)
                for sums in self._plots:
                    sums.show(plot)
        variants: tuple[str, ...] = ()
        if settled:
            logits = watch.history.logits(lane, row)
            made = routers.as_generated(table, lane, row)
            token_id = int(lane.token_id[row])
            variants = view.variant_lines(table, logits, token_id, made, look.lettered()[:4])
        self.query_one(TokenPanel).show(
            view.token_data(table, lane, row, watch.history.pieces, variants)
        )

    # --- what the mouse and the prompt do

    @on(ExpertMap.Picked)
    def _expert_picked(self, event: ExpertMap.Picked) -> None:
        self.look.router, self.look.expert = event.router, event.expert
        self.draw()

    @on(Transcript.Picked)
    def _token_picked(self, event: Transcript.Picked) -> None:
        self.look.seek(event.index, following=False)
        self.draw()

    @on(Transport.Sought)
    def _sought(self, event: Transport.Sought) -> None:
        self.look.seek(event.position)
        self.draw()

    @on(VariantBar.Picked)
    def _variant_picked(self, event: VariantBar.Picked) -> None:
        expression = self.look.letter(event.letter)
        self.look.shown = None if self.look.shown == expression else expression
        self.draw()

    @on(Input.Submitted, "#prompt")
    def _prompted(self, event: Input.Submitted) -> None:
        self.set_focus(None)
        if event.value and self.subject.table is not None:
            self.ask(event.value)
            event.input.clear()
            self.draw()

    def say(self, text: str, severity: str = "information") -> None:
        self.notify(
            printable(text, 500),
            severity=severity,  # type: ignore[arg-type]
            markup=False,
            timeout=6,
        )
