"""The variants of this session: which one generates, which are shown on the same logits."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.message import Message

from moescope.ui.panels import VariantBarData, VariantItem
from moescope.ui.text import cells, cut
from moescope.ui.widgets.panel import Panel, Row, Span

GLYPHS = {"generating": "●", "same_logits": "○"}
LEAD = " router"
SIDE_TITLE = 12  # what variants that only stand by keep of their titles, before others are cut


class VariantBar(Panel[VariantBarData]):
    """`A● trained   B○ softmax over selected   C○ … ≡ A`."""

    DEFAULT_CSS = "VariantBar { height: 1; border: none; } VariantBar:focus { border: none; }"

    class Picked(Message):
        """A variant was clicked."""

        def __init__(self, letter: str) -> None:
            super().__init__()
            self.letter = letter

    def draw(self, data: VariantBarData, width: int, height: int) -> Sequence[Row]:
        spans: list[Span] = [(LEAD, "dim")]
        for text, item in zip(shown(data, width), data.items, strict=True):
            pen = "cursor" if item.shown else "strong" if item.state == "generating" else "text"
            spans += [("  ", "text"), (text, pen)]
        return (tuple(spans),)

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if self.data is None or offset is None:
            return
        left = cells(LEAD)
        for text, item in zip(shown(self.data, self.size.width), self.data.items, strict=True):
            left += 2
            right = left + cells(text)
            if left <= offset.x < right:
                self.post_message(self.Picked(item.letter))
                return
            left = right


def label(item: VariantItem, room: int) -> str:
    """One entry with its title cut to `room` cells."""
    equal = f" ≡ {item.equal_to}" if item.equal_to else ""
    title = f" {cut(item.title, room)}" if room > 1 else ""
    return f"{item.letter}{GLYPHS[item.state]}{title}{equal}"


def shown(data: VariantBarData, width: int) -> list[str]:
    """All entries; where they do not fit, titles are cut: first of those that only stand by."""
    longest = max((cells(item.title) for item in data.items), default=0)
    room = width - cells(LEAD)
    limits = [(side, longest) for side in range(longest, SIDE_TITLE, -1)]
    limits += [(min(main, SIDE_TITLE), main) for main in range(longest, 0, -1)]
    texts = [label(item, longest) for item in data.items]
    for side, main in limits:
        if sum(cells(text) + 2 for text in texts) <= room:
            break
        texts = [
            label(item, main if item.shown or item.state == "generating" else side)
            for item in data.items
        ]
    return texts
