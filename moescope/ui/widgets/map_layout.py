"""Where everything on the expert map stands: zoom, sizes of cells, the window, and hit-testing.

Pure arithmetic over sizes; what a cell looks like is in `map_cells.py`. Columns, left to right:
gutter (label and row marker), cells, sums. Rows: a ruler, then the routers, then maybe a legend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Zoom = Literal["cell", "half", "braille"]
KINDS: tuple[Zoom, ...] = ("cell", "half", "braille")
ZOOMS = ("auto", *KINDS)

SUM_WIDTH = 6  # flag, bar, four characters
RULER = 1
BLOCK_ROWS = {"cell": 1, "half": 2, "braille": 4}  # routers a row
WIDEST_TILE = {1: 4, 2: 5, 3: 7, 4: 8, 5: 10, 6: 12}  # by height: wider would look stretched
TALLEST = 6
LONGEST_BAR = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """One arrangement of the map in a panel."""

    zoom: Zoom
    width: int
    height: int
    gutter: int  # columns of label and marker
    cell_width: int  # columns an expert takes (cell zoom)
    cell_height: int  # rows a router takes (cell zoom)
    merge: int  # experts behind one dot (braille)
    columns: int  # columns of cells
    rows: int  # rows of cells
    first_expert: int
    first_router: int
    experts: int  # shown
    routers: int  # shown
    sum_width: int
    bar_width: int  # of a horizontal bar beside the sum; 0 draws one glyph
    legend: bool

    @property
    def per_column(self) -> int:
        """Experts behind one column of cells (braille)."""
        return 2 * self.merge if self.zoom == "braille" else 1

    @property
    def per_row(self) -> int:
        """Routers behind one row of cells."""
        return BLOCK_ROWS[self.zoom]

    def column_of(self, expert: int) -> int:
        """The column, within the cells, where `expert` starts."""
        if self.zoom == "braille":
            return (expert - self.first_expert) // self.per_column
        return (expert - self.first_expert) * self.cell_width

    def cell_at(self, x: int, y: int) -> tuple[int, int] | None:
        """(router, expert) at a position in the panel; the first of those that share it."""
        column, row = x - self.gutter, y - RULER
        if not (0 <= column < self.columns and 0 <= row < self.rows):
            return None
        if self.zoom == "cell":
            router, expert = row // self.cell_height, column // self.cell_width
        else:
            router, expert = row * self.per_row, column * self.per_column
        if router >= self.routers or expert >= self.experts:
            return None
        return self.first_router + router, self.first_expert + expert


def plan(
    width: int,
    height: int,
    routers: int,
    experts: int,
    cursor: tuple[int, int],
    *,
    zoom: str = "auto",
    label_width: int = 2,
    sum_width: int = SUM_WIDTH,
    shades: bool = False,
) -> Layout:
    """The largest arrangement that fits, or the zoom that was asked for, around the cursor.

    `shades`: there are no colours, so half blocks, which say nothing but picks, are passed over.
    """
    gutter = label_width + 1
    room = max(1, width - gutter - sum_width)
    lines = max(1, height - RULER)
    kind = _zoom(zoom, room, lines, routers, experts, shades)
    if kind == "braille":
        return _braille(width, height, gutter, room, lines, routers, experts, cursor, sum_width)
    wide, tall = _tile(room, lines, routers, experts) if kind == "cell" else (1, 1)
    block = BLOCK_ROWS[kind]
    shown_experts = min(experts, room // wide)
    blocks = min(-(-routers // block), lines // tall)
    columns, rows = shown_experts * wide, blocks * tall
    spare = room - columns
    bar_width = min(spare - 1, LONGEST_BAR) if spare >= 5 else 0
    return Layout(
        zoom=kind,
        width=width,
        height=height,
        gutter=gutter,
        cell_width=wide,
        cell_height=tall,
        merge=1,
        columns=columns,
        rows=rows,
        first_expert=window(cursor[1], shown_experts, experts),
        first_router=window(cursor[0] // block, blocks, -(-routers // block)) * block,
        experts=shown_experts,
        routers=min(blocks * block, routers),
        sum_width=sum_width,
        bar_width=bar_width,
        legend=height - RULER - rows >= 2,
    )


def _zoom(zoom: str, room: int, lines: int, routers: int, experts: int, shades: bool) -> Zoom:
    for kind in KINDS:
        if zoom == kind:
            return kind
    if experts <= room and routers <= lines:
        return "cell"
    if experts <= room and -(-routers // 2) <= lines and not shades:
        return "half"
    return "braille"


def _tile(room: int, lines: int, routers: int, experts: int) -> tuple[int, int]:
    """Columns and rows of one cell: as large as fits without stretching it."""
    tall = min(TALLEST, max(1, lines // routers))
    wide = min(WIDEST_TILE[tall], max(1, room // experts))
    return wide, min(tall, wide // 2 + 1)


def _braille(
    width: int,
    height: int,
    gutter: int,
    room: int,
    lines: int,
    routers: int,
    experts: int,
    cursor: tuple[int, int],
    sum_width: int,
) -> Layout:
    merge = 1
    while -(-experts // (2 * merge)) > room:
        merge *= 2
    blocks = -(-routers // 4)
    rows = min(blocks, lines)
    return Layout(
        zoom="braille",
        width=width,
        height=height,
        gutter=gutter,
        cell_width=1,
        cell_height=1,
        merge=merge,
        columns=-(-experts // (2 * merge)),
        rows=rows,
        first_expert=0,
        first_router=window(cursor[0] // 4, rows, blocks) * 4,
        experts=experts,
        routers=min(rows * 4, routers),
        sum_width=sum_width,
        bar_width=0,
        legend=height - RULER - rows >= 2,
    )


def window(cursor: int, shown: int, total: int) -> int:
    """The first of `shown` items out of `total`, with the cursor in the middle where possible."""
    return max(0, min(cursor - shown // 2, total - shown))


def ruler(layout: Layout, cursor_expert: int) -> tuple[str, tuple[int, int]]:
    """Expert numbers over their columns, and the span of the cursor's own number."""
    digits = len(str(layout.first_expert + layout.experts - 1))
    per_expert = layout.cell_width / layout.per_column
    apart = digits + 1 if layout.cell_width >= 3 else max(8, digits + 1)
    step = 1
    while step * per_expert < apart:
        step *= 2
    line = [" "] * (layout.gutter + layout.columns)
    last = layout.first_expert + layout.experts
    for expert in range(-(-layout.first_expert // step) * step, last, step):
        _place(line, layout, expert)
    if not layout.first_expert <= cursor_expert < last:
        return "".join(line), (0, 0)
    start, end = _label_span(line, layout, cursor_expert)
    for x in range(max(layout.gutter, start - 1), min(len(line), end + 1)):
        line[x] = " "
    _clear_cut_numbers(line, start - 2, end + 1, layout.gutter)
    _place(line, layout, cursor_expert)
    return "".join(line), (start, end)


def _label_span(line: list[str], layout: Layout, expert: int) -> tuple[int, int]:
    width = len(str(expert))
    start = layout.gutter + layout.column_of(expert) + max(0, (layout.cell_width - width) // 2)
    start = min(start, len(line) - width)
    return start, start + width


def _place(line: list[str], layout: Layout, expert: int) -> None:
    start, end = _label_span(line, layout, expert)
    if start >= layout.gutter:
        line[start:end] = str(expert)


def _clear_cut_numbers(line: list[str], left: int, right: int, gutter: int) -> None:
    """Remove what is left of numbers that the cursor's number has overwritten."""
    while left >= gutter and line[left] != " ":
        line[left] = " "
        left -= 1
    while right < len(line) and line[right] != " ":
        line[right] = " "
        right += 1
