"""A lane's text, tinted token by token; every cell knows its token.

Appending wraps the last row only (`transcript_rows.py`); strips are kept per row. The view follows
the end by a flag of its own, until the reader scrolls away or the data says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip

from moescope.ui.panels import TokenCell, TranscriptData
from moescope.ui.text import NEWLINE, cut
from moescope.ui.widgets.panel import Panel
from moescope.ui.widgets.transcript_rows import LINE_FEED, Rows

SCROLLBAR = 1  # a column at the right, whether anything is out of view or not
WHEEL = 3
REVERSE, BOLD, UNDERLINE = Style(reverse=True), Style(bold=True), Style(underline=True)


class Transcript(Panel[TranscriptData], can_focus=True):
    """Prompt and generated text; the last row stays in view while following."""

    EMPTY = "nothing said yet"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "page(-1)", "Page back", show=False, id="transcript.pageup"),
        Binding("pagedown", "page(1)", "Page on", show=False, id="transcript.pagedown"),
        Binding("home", "edge(-1)", "Start", show=False, id="transcript.home"),
        Binding("end", "edge(1)", "End", show=False, id="transcript.end"),
    ]

    class Picked(Message):
        """A token was clicked: its index into `cells`."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    class Scrolled(Message):
        """The reader scrolled; `at_end` says whether the last row is in view."""

        def __init__(self, at_end: bool) -> None:
            super().__init__()
            self.at_end = at_end

    def __init__(self, **names: Any) -> None:
        super().__init__(**names)
        self._wrapped = Rows(1)
        self._built: dict[int, Strip] = {}
        self._thumb = range(0)
        self._top = 0
        self._following = True
        self._tints: dict[tuple[str, int, bool, bool], Style] = {}

    def labels(self, data: TranscriptData) -> tuple[str, str]:
        return data.title, data.subtitle

    # --- data ---------------------------------------------------------------------------------

    def show(self, data: TranscriptData | None) -> None:
        """Draw `data`: new tokens cost their own rows, a moved cursor the rows it touches."""
        old = self._data
        if data is old:
            return
        self._data = data
        self._relabel()
        if data is None or not self._drawable():
            self.refresh()
            return
        if old is None or old.follow != data.follow:
            self._following = data.follow
        if (
            old is None
            or old.epoch != data.epoch
            or len(data.cells) < self._wrapped.tokens
            or self._wrapped.width != self._text_width
        ):
            self._rewrap()
            return
        dirty: set[int] = set()
        if old.tint_epoch != data.tint_epoch:
            self._built.clear()
            dirty.update(range(self._top, self._top + self.size.height))
        if old.cursor != data.cursor:
            for cursor in (old.cursor, data.cursor):
                if cursor is not None:
                    dirty.update(self._wrapped.rows_of(cursor))
        dirty.update(self._append(data.cells[self._wrapped.tokens :]))
        if not old.cells and data.cells:  # the words for "nothing" stood there
            dirty.update(range(self.size.height))
        moved = self._place(moved_cursor=old.cursor != data.cursor)
        self._repaint(dirty, everything=moved)

    def _append(self, new: Iterable[TokenCell]) -> range:
        first = len(self._wrapped.rows) - 1
        grown = False
        for cell in new:
            self._wrapped.append(cell.text)
            grown = True
        return range(first, len(self._wrapped.rows)) if grown else range(0)

    def _rewrap(self) -> None:
        self._wrapped = Rows(self._text_width)
        self._built.clear()
        self._append(self._data.cells if self._data is not None else ())
        self._place(moved_cursor=True)
        self.refresh()

    def _place(self, moved_cursor: bool) -> bool:
        """Choose the first row in view. Whether it changed."""
        height, top = self.size.height, self._top
        cursor = self._data.cursor if self._data is not None else None
        if self._following:
            top = self._last_top
        elif moved_cursor and cursor is not None:
            rows = self._wrapped.rows_of(cursor)
            if rows.start < top:
                top = rows.start
            elif rows.stop > top + height:
                top = rows.stop - height
        top = max(0, min(top, self._last_top))
        changed, self._top = top != self._top, top
        return changed

    def _repaint(self, dirty: Iterable[int], everything: bool) -> None:
        before, self._thumb = self._thumb, self._thumb_rows()
        for row in dirty:
            self._built.pop(row, None)
        if everything:
            self.refresh()
            return
        height, width = self.size.height, self.size.width
        lines = {row - self._top for row in dirty}
        lines |= set(before).symmetric_difference(self._thumb)
        for y in lines:
            if 0 <= y < height:
                self.refresh(Region(0, y, width, 1))

    # --- view ---------------------------------------------------------------------------------

    def _drawable(self) -> bool:
        return self.size.width > SCROLLBAR and self.size.height > 0

    @property
    def _text_width(self) -> int:
        return max(1, self.size.width - SCROLLBAR)

    @property
    def _last_top(self) -> int:
        return max(0, len(self._wrapped.rows) - self.size.height)

    @property
    def following(self) -> bool:
        """Whether the last row is kept in view."""
        return self._following

    def scroll_rows(self, rows: int) -> None:
        """Move the view by `rows` (negative: back); at the end it follows again."""
        top = max(0, min(self._top + rows, self._last_top))
        at_end = top == self._last_top
        if top == self._top and at_end == self._following:
            return
        self._top, self._following = top, at_end
        self._repaint((), everything=True)
        self.post_message(self.Scrolled(at_end))

    def page(self, direction: int) -> None:
        """Move the view by one page forwards (1) or back (-1)."""
        self.scroll_rows(direction * max(1, self.size.height - 1))

    def home(self) -> None:
        self.scroll_rows(-len(self._wrapped.rows))

    def end(self) -> None:
        self.scroll_rows(len(self._wrapped.rows))

    def action_page(self, direction: int) -> None:
        self.page(direction)

    def action_edge(self, direction: int) -> None:
        self.scroll_rows(direction * len(self._wrapped.rows))

    # --- drawing ------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        style, width = self.pens.style, self.size.width
        data = self._data
        if data is None or not data.cells:
            words = cut(self.EMPTY, width) if y == 0 else ""
            return Strip([Segment(words, style["dim"])]).adjust_cell_length(width, style["text"])
        if width <= SCROLLBAR:
            return Strip.blank(width, style["text"])
        row = self._top + y
        strip = self._built.get(row)
        if strip is None:
            strip = self._built[row] = self._build(row, data)
        bar = Segment("┃", style["rule"]) if y in self._thumb else Segment(" ", style["text"])
        return Strip([*strip, bar], width)

    def _build(self, row: int, data: TranscriptData) -> Strip:
        segments: list[Segment] = []
        fragments = self._wrapped.rows[row] if row < len(self._wrapped.rows) else ()
        for text, token, _ in fragments:
            here = token == data.cursor
            if text == LINE_FEED or not text:
                if not here:
                    continue
                text = NEWLINE if text else "·"
            segments.append(Segment(text, self._style(data.cells[token], here)))
        strip = Strip(segments)
        width = self._text_width
        if strip.cell_length > width:
            strip = strip.crop(0, width)
        return strip.adjust_cell_length(width, self.pens.style["text"])

    def _style(self, cell: TokenCell, cursor: bool) -> Style:
        key = (cell.kind, cell.level, cell.marked, cursor)
        style = self._tints.get(key)
        if style is None:
            pens = self.pens
            style = pens.tint[cell.level]
            if cell.kind != "text":
                style += pens.ink["dim" if cell.kind == "special" else "soft"]
            if cell.marked:
                style += pens.ink["wrong"] + UNDERLINE
            if cursor:
                style += REVERSE + BOLD
            self._tints[key] = style
        return style

    def _thumb_rows(self) -> range:
        """Lines of the scrollbar's thumb; none while everything is in view."""
        rows, height = len(self._wrapped.rows), self.size.height
        if rows <= height:
            return range(0)
        length = max(1, height * height // rows)
        start = round((height - length) * self._top / max(1, self._last_top))
        return range(start, start + length)

    def on_resize(self, event: events.Resize) -> None:
        self._relabel(force=True)
        if not self._drawable():
            return
        if self._wrapped.width != self._text_width:
            self._rewrap()
        elif self._data is not None:
            self._place(moved_cursor=True)
        self._repaint((), everything=True)

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._built.clear()
        self._tints.clear()

    # --- mouse --------------------------------------------------------------------------------

    def token_at(self, x: int, y: int) -> int | None:
        """The token under a position inside the border."""
        if self._data is None or not self._data.cells:
            return None
        return self._wrapped.token_at(self._top + y, x)

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        token = self.token_at(offset.x, offset.y) if offset is not None else None
        if token is not None:
            self.post_message(self.Picked(token))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.scroll_rows(-WHEEL)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.scroll_rows(WHEEL)
