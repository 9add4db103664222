"""What all panels share: rows of styled text, compared before they are drawn.

A panel turns its data into rows (tuples of `(text, pen)`), keeps them, and refreshes the rows that
differ. Borders come from CSS; the title stands left in the top edge, a note right. Text is never
parsed as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from rich.segment import Segment
from textual import events
from textual.color import Color
from textual.content import Content
from textual.filter import ANSIToTruecolor, LineFilter
from textual.geometry import Region
from textual.strip import Strip
from textual.style import Style
from textual.widget import Widget

from moescope.ui.ramp import Pens, pens_of
from moescope.ui.text import cells, cut, in_turn, plain

Span = tuple[str, str]  # text, pen
Row = tuple[Span, ...]
Data = TypeVar("Data")


class Panel(Widget, Generic[Data]):
    """Draws one dataclass of `panels.py`. Subclasses give `draw` and, if framed, `labels`."""

    DEFAULT_CSS = """
    Panel { height: 1fr; width: 1fr; border: round $foreground 30%; color: $foreground;
        border-title-color: $foreground 80%; }
    Panel:focus { border: round $foreground 60%; }
    """
    ALLOW_SELECT = False
    can_focus = False
    EMPTY: ClassVar[str] = ""  # what stands there before there is data

    def __init__(
        self, *, id: str | None = None, classes: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes, name=name)
        self._data: Data | None = None
        self._rows: Sequence[Row] = ()
        self._strips: dict[int, Strip] = {}
        self._pens: Pens | None = None
        self._labels: tuple[str, str] = ("", "")

    @property
    def data(self) -> Data | None:
        """What is shown now."""
        return self._data

    @property
    def pens(self) -> Pens:
        if self._pens is None:
            self._pens = pens_of(self)
        return self._pens

    def draw(self, data: Data, width: int, height: int) -> Sequence[Row]:
        """The rows of `data` in `width` × `height` cells. Pure. None: the widget draws by itself
        (Textual calls the handlers of base classes too, so this is reached on every resize)."""
        return ()

    def labels(self, data: Data) -> tuple[str, str]:
        """The title and the note at the right of the top edge."""
        return ("", "")

    def show(self, data: Data | None) -> None:
        """Draw `data`, touching only what differs from what is drawn."""
        if data is self._data:
            return
        self._data = data
        self._relabel()
        self._redraw()

    def _redraw(self) -> None:
        width, height = self.size
        if not width or not height:
            return
        rows = self._draw_rows(width, height)
        old, self._rows = self._rows, rows
        changed = []
        for y in range(max(len(old), len(rows))):
            before = old[y] if y < len(old) else ()
            after = rows[y] if y < len(rows) else ()
            if before != after:
                self._strips.pop(y, None)
                changed.append(y)
        if regions := [Region(0, y, width, 1) for y in changed if y < height]:
            self.refresh(*regions)

    def _draw_rows(self, width: int, height: int) -> Sequence[Row]:
        if self._data is None:
            return (((cut(self.EMPTY, width), "dim"),),)
        return tuple(self.draw(self._data, width, height))[:height]

    def _relabel(self, force: bool = False) -> None:
        labels = self.labels(self._data) if self._data is not None else ("", "")
        if labels == self._labels and not force:
            return
        self._labels = labels
        edge, color = self.styles.border_top
        width = self.outer_size.width - 6
        if not edge or width <= 0:
            return
        title, note = cut(labels[0], width), plain(labels[1])
        room = width - cells(title) - cells(note) - 2
        if not note or room < 1:
            self._entitle(Content(title), force)
            return
        line = Style(foreground=color if isinstance(color, Color) else None)
        self._entitle(Content.assemble(title, " ", ("─" * room, line), " ", note), force)

    def _entitle(self, title: Content, force: bool) -> None:
        """Write into the top edge. What sets a title draws all of a widget again, and titles change
        with every token: here only the edge is drawn."""
        if force or self._border_title is None:
            self.border_title = title
        else:
            self._border_title = title.expand_tabs(4)
            self.refresh(Region(0, -1, self.size.width, 1))

    def render_line(self, y: int) -> Strip:
        strip = self._strips.get(y)
        if strip is None:
            strip = self._strip(self._rows[y] if y < len(self._rows) else ())
            self._strips[y] = strip
        return strip

    def _strip(self, row: Row) -> Strip:
        style = self.pens.style
        width = self.size.width
        strip = Strip([Segment(text, style[pen]) for text, pen in row if text])
        return strip.adjust_cell_length(width, style["text"])

    def on_resize(self, event: events.Resize) -> None:
        self._strips.clear()
        self._relabel(force=True)
        self._redraw()

    def on_focus(self) -> None:
        self._relabel(force=True)

    def on_blur(self) -> None:
        self._relabel(force=True)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Without the filter that replaces ANSI colours, where there are none: a third cheaper."""
        filters = super().get_line_filters()
        if not self.pens.colours:
            return filters
        each = [one for few in filters for one in getattr(few, "filters", (few,))]
        return [in_turn(tuple(one for one in each if not isinstance(one, ANSIToTruecolor)))]

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._pens = None
        self._strips.clear()
