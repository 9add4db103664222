"""The expert map: every router and every expert on one screen.

Picks of this token are shapes, recent load is colour, the score sum stands at the right. How large
a cell is and which routers are in view is `map_layout.py`; what a cell looks like `map_cells.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.segment import Segment
from textual import events
from textual.content import Content
from textual.message import Message
from textual.strip import Strip

from moescope.ui.panels import LEVELS, MapData
from moescope.ui.ramp import PICK, ROW_MARK, SHADES, WRONG, sum_bar, thin_bar
from moescope.ui.text import cells, cut, fit, number
from moescope.ui.widgets.map_cells import MapBrush, braille_codes, cell_codes, half_codes
from moescope.ui.widgets.map_layout import RULER, SUM_WIDTH, ZOOMS, Layout, plan, ruler
from moescope.ui.widgets.panel import Panel

KEPT_STRIPS = 4096
PICKED = {"cell": PICK, "half": "▀", "braille": "⠂"}


class ExpertMap(Panel[MapData]):
    """Picks by shape, load by colour, the score sum at the right."""

    EMPTY = "no router has decided anything yet"

    class Picked(Message):
        """A cell was clicked."""

        def __init__(self, router: int, expert: int) -> None:
            super().__init__()
            self.router = router
            self.expert = expert

    class Hovered(Message):
        """The mouse is over this cell; None when it left the cells."""

        def __init__(self, cell: tuple[int, int] | None) -> None:
            super().__init__()
            self.cell = cell

    def __init__(self, **names: Any) -> None:
        super().__init__(**names)
        self._zoom = "auto"
        self._layout_now: Layout | None = None
        self._brush: MapBrush | None = None
        self._memo: dict[Any, Strip] = {}
        self._hover: tuple[int, int] | None = None

    # --- zoom ---------------------------------------------------------------------------------

    @property
    def zoom(self) -> str:
        """`auto` takes the largest that fits; else `cell`, `half` or `braille`."""
        return self._zoom

    @zoom.setter
    def zoom(self, value: str) -> None:
        if value not in ZOOMS:
            raise ValueError(f"zoom: expected one of {', '.join(ZOOMS)}, found {value}")
        self._zoom = value
        self._redraw()

    @property
    def zoom_shown(self) -> str:
        """The zoom that is drawn now, also under `auto`."""
        return self._layout_now.zoom if self._layout_now is not None else "cell"

    def zoom_in(self) -> None:
        """Larger cells."""
        self._step_zoom(-1)

    def zoom_out(self) -> None:
        """Smaller cells, more of them."""
        self._step_zoom(1)

    def _step_zoom(self, step: int) -> None:
        steps = ZOOMS[1:]
        self.zoom = steps[min(len(steps) - 1, max(0, steps.index(self.zoom_shown) + step))]

    # --- drawing ------------------------------------------------------------------------------

    def labels(self, data: MapData) -> tuple[str, str]:
        router, expert = data.cursor
        return data.title, f"L{data.gutter[router]} E{expert:03d}" if data.gutter else ""

    def show(self, data: MapData | None) -> None:
        before = self._data
        super().show(data)
        if before is None or data is None or compares(before) != compares(data):
            self._brush = None
            self._memo.clear()

    def _draw_rows(self, width: int, height: int) -> Sequence[Any]:
        data = self._data
        if data is None or not data.gutter:
            return ((cut(self.EMPTY, width),),)
        right = SUM_WIDTH
        if data.right is not None:
            right = max(right, *map(cells, data.right)) + 1
        layout = self._layout_now = plan(
            width,
            height,
            len(data.gutter),
            max(1, data.levels.shape[1]),
            data.cursor,
            zoom=self._zoom,
            label_width=max(map(cells, data.gutter)),
            sum_width=right,
            shades=not self.pens.colours,
        )
        rows: list[Any] = [("ruler", *ruler(layout, data.cursor[1]), _sum_title(data, layout))]
        rows += _map_rows(data, layout)
        if layout.legend:
            rows += [()] * (RULER + layout.rows + 1 - len(rows))
            rows.append(("legend", PICKED[layout.zoom], compares(data)))
        return rows

    def _strip(self, row: Any) -> Strip:
        strip = self._memo.get((row, self.size.width))
        if strip is None:
            if len(self._memo) > KEPT_STRIPS:
                self._memo.clear()
            strip = self._memo[(row, self.size.width)] = self._build(row)
        return strip

    def _build(self, row: Any) -> Strip:
        style, width = self.pens.style, self.size.width
        segments: list[Segment] = []
        if not row:
            pass
        elif row[0] == "ruler":
            segments = self._ruler_segments(row)
        elif row[0] == "legend":
            segments = self._legend_segments(*row[1:])
        elif len(row) == 1:
            segments = [Segment(row[0], style["dim"])]
        else:
            segments = self._row_segments(row)
        if row and row[0] in ZOOMS:  # widths are known: measuring each segment again costs more
            room = width - sum(map(cells, (row[6], *(text for text, _ in row[8])))) - row[9]
            if room >= 0:
                blank = [Segment(" " * room, style["text"])] if room else []
                return Strip([*segments, *blank], width)
        return Strip(segments).adjust_cell_length(width, style["text"])

    def _ruler_segments(self, row: Any) -> list[Segment]:
        _, line, (start, end), title = row
        style = self.pens.style
        return [
            Segment(line[:start], style["dim"]),
            Segment(line[start:end], style["accent"]),
            Segment(line[end:], style["dim"]),
            Segment(title, style["dim"]),
        ]

    def _legend_segments(self, picked: str, compare: bool) -> list[Segment]:
        pens = self.pens
        style = pens.style
        segments = [Segment("   load  less ", style["dim"])]
        for level in range(LEVELS):
            if pens.colours:
                segments.append(Segment("  ", pens.load[level]))
            else:
                segments.append(Segment(SHADES[level], pens.load_ink[level]))
        segments.append(Segment(" more", style["dim"]))
        marks = (
            (("a", "left only"), ("b", "right only"))
            if compare
            else ((picked, "picked by this token"),)
        )
        for mark, meaning in marks:
            segments.append(Segment(f"   {mark} ", style["mark"]))
            segments.append(Segment(meaning, style["dim"]))
        return segments

    def _row_segments(self, row: Any) -> list[Segment]:
        zoom, line, wide, tall, codes, dtype, label, here, tail, _ = row
        pens = self.pens
        if self._brush is None or self._brush.pens is not pens:
            self._brush = MapBrush(pens, self._data is not None and compares(self._data))
        array = np.frombuffer(codes, dtype)
        if zoom == "cell":
            body = self._brush.cells(array, line, wide, tall)
        elif zoom == "half":
            body = self._brush.halves(array)
        else:
            body = self._brush.blocks(array)
        gutter = Segment(label, pens.style["accent" if here else "dim"])
        return [gutter, *body, *(Segment(text, pens.style[pen]) for text, pen in tail)]

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._memo.clear()
        self._brush = None
        if self.is_running:  # another theme may have colours where this one had shades
            self.call_later(self._redraw)

    # --- mouse --------------------------------------------------------------------------------

    def cell_at(self, x: int, y: int) -> tuple[int, int] | None:
        """(router, expert) under a position inside the border."""
        if self._data is None or self._layout_now is None:
            return None
        cell = self._layout_now.cell_at(x, y)
        if cell is None or cell[1] >= int(self._data.num_experts[cell[0]]):
            return None
        return cell

    def on_mouse_move(self, event: events.MouseMove) -> None:
        offset = event.get_content_offset(self)
        self._over(self.cell_at(offset.x, offset.y) if offset is not None else None)

    def on_leave(self, event: events.Leave) -> None:
        self._over(None)

    def _over(self, cell: tuple[int, int] | None) -> None:
        if cell == self._hover:
            return
        self._hover = cell
        self.tooltip = Content(self.describe(cell)) if cell is not None else None
        self.post_message(self.Hovered(cell))

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        cell = self.cell_at(offset.x, offset.y) if offset is not None else None
        if cell is not None:
            self.post_message(self.Picked(*cell))

    def describe(self, cell: tuple[int, int]) -> str:
        """One cell in words, for the tooltip."""
        data = self._data
        assert data is not None
        router, expert = cell
        words = [f"L{data.gutter[router]} E{expert:03d}"]
        words.append(f"load {int(data.levels[cell])} of {LEVELS - 1}")
        if data.marks[cell]:
            words.append("picked by this token")
        return " · ".join(words)


def compares(data: MapData) -> bool:
    """Whether the map shows two lanes."""
    return data.right is not None or bool((data.marks > 1).any())


def _sum_title(data: MapData, layout: Layout) -> str:
    if data.right is not None:
        return fit(data.heading, layout.sum_width, ">")
    return "     Σ" if layout.per_row == 1 else "mean Σ"


def _map_rows(data: MapData, layout: Layout) -> list[Any]:
    """One comparable value for each row of cells: everything that its picture depends on."""
    if layout.zoom == "cell":
        codes: Any = cell_codes(data, layout)
    elif layout.zoom == "half":
        codes = half_codes(data, layout)
    else:
        codes = braille_codes(data, layout, compares(data))
    rows: list[Any] = []
    dtype = codes.dtype.str
    sums, wrongs = data.score_sum.tolist(), data.sum_wrong.tolist()
    wide, tall, step = layout.cell_width, layout.cell_height, layout.per_row
    for index, line_codes in enumerate(codes):
        first = layout.first_router + index * step
        here = first <= data.cursor[0] < first + step
        label = fit(data.gutter[first], layout.gutter - 1, ">") + (ROW_MARK if here else " ")
        block = slice(first, first + step)
        tail = _tail(data, layout, sums[block], wrongs[block], first)
        key = line_codes.tobytes()
        middle = (tall - 1) // 2
        for line in range(tall):
            named = line == middle
            rows.append(
                (
                    layout.zoom,
                    line,
                    wide,
                    tall,
                    key,
                    dtype,
                    label if named else " " * layout.gutter,
                    here and named,
                    tail if named else (),
                    layout.columns,
                )
            )
    return rows


def _tail(
    data: MapData, layout: Layout, sums: Sequence[float], wrongs: Sequence[bool], first: int
) -> tuple[tuple[str, str], ...]:
    """The sum column of a router or, in the smaller zooms, of a row of them."""
    if data.right is not None:
        return ((fit(data.right[first], layout.sum_width, ">"), "text"),)
    known = [value for value in sums if value == value]
    value = sum(known) / len(known) if known else math.nan
    wrong = any(wrongs)
    flag = WRONG if wrong else " "
    if layout.bar_width:
        figures = number(value, 3).rjust(5)
        body = thin_bar(value, layout.bar_width)
        return (
            (flag, "wrong"),
            (figures + " ", "wrong" if wrong else "text"),
            (body, "wrong" if wrong else "bar"),
        )
    figures = number(value, 2).rjust(4)
    return (
        (flag, "wrong"),
        (sum_bar(value), "wrong" if wrong else "bar"),
        (figures, "wrong" if wrong else "text"),
    )
