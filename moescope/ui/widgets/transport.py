"""The line under a replay: where it is, how fast it plays, and a bar to scrub."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.message import Message

from moescope.ui.panels import TransportData
from moescope.ui.text import cells
from moescope.ui.widgets.panel import Panel, Row


class Transport(Panel[TransportData]):
    """`▶ ━━━━━━╸──────  412 of 2048 tokens  1×`; a click or a drag on the bar scrubs."""

    DEFAULT_CSS = "Transport { height: 1; border: none; } Transport:focus { border: none; }"

    class Sought(Message):
        """The bar was clicked or dragged at this position."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

    def draw(self, data: TransportData, width: int, height: int) -> Sequence[Row]:
        tail = tail_of(data)
        room = bar_width(data, width)
        done = round(room * data.position / data.total) if data.total else 0
        return (
            (
                (" ▶ " if data.playing else " ‖ ", "accent"),
                ("━" * done, "bar"),
                ("─" * (room - done), "rule"),
                (tail, "text"),
            ),
        )

    def on_click(self, event: events.Click) -> None:
        self._seek(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if event.button == 1:
            self._seek(event.x)

    def _seek(self, x: int) -> None:
        if self.data is None or not self.data.total:
            return
        room = bar_width(self.data, self.size.width)
        if room and 3 <= x < 3 + room:
            share = (x - 3) / max(1, room - 1)
            self.post_message(self.Sought(round(share * (self.data.total - 1))))


def tail_of(data: TransportData) -> str:
    count = min(data.position + 1, data.total)  # as the line on top counts
    return f"  {count} of {data.total} tokens  {data.speed:g}× "


def bar_width(data: TransportData, width: int) -> int:
    return max(0, width - 3 - cells(tail_of(data)))
