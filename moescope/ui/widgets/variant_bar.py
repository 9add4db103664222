"""The variants of this session: which one generates, which are shown on the same logits."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.message import Message

from moescope.ui.panels import VariantBarData, VariantItem
from moescope.ui.text import cells
from moescope.ui.widgets.panel import Panel, Row, Span

GLYPHS = {"generating": "●", "same_logits": "○"}


class VariantBar(Panel[VariantBarData]):
    """`A● trained   B○ softmax over selected   C○ … ≡ A`."""

    DEFAULT_CSS = "VariantBar { height: 1; border: none; } VariantBar:focus { border: none; }"

    class Picked(Message):
        """A variant was clicked."""

        def __init__(self, letter: str) -> None:
            super().__init__()
            self.letter = letter

    def draw(self, data: VariantBarData, width: int, height: int) -> Sequence[Row]:
        spans: list[Span] = [(" router ", "dim")]
        for item in data.items:
            spans += [("  ", "text"), (label(item), "cursor" if item.shown else "text")]
        return (tuple(spans),)

    def on_click(self, event: events.Click) -> None:
        if self.data is None:
            return
        left = cells(" router ")
        for item in self.data.items:
            left += 2
            right = left + cells(label(item))
            if left <= event.x < right:
                self.post_message(self.Picked(item.letter))
                return
            left = right


def label(item: VariantItem) -> str:
    equal = f" ≡ {item.equal_to}" if item.equal_to else ""
    return f"{item.letter}{GLYPHS[item.state]} {item.title}{equal}"
