"""What a cell of the expert map looks like in each zoom: codes per cell, and codes into segments.

A row of cells is an array of small integers (level, mark, cursor). Equal neighbours become one
segment; segments are built once per theme and kept. `MapBrush` holds those tables for one `Pens`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from moescope.ui.panels import MapData
from moescope.ui.ramp import PICK, PICK_A, PICK_B, PICK_BOTH, SHADES, Pens
from moescope.ui.widgets.map_layout import Layout

# a cell's code: level | mark << 3, CURSOR where the cursor stands, ABSENT where there is no expert
MARK_SHIFT, CURSOR, ABSENT = 3, 32, 64
# a braille column's code: dots | level << 8 | who << 11 | CURSOR_BLOCK, ABSENT_BLOCK
LEVEL_SHIFT, WHO_SHIFT, CURSOR_BLOCK, ABSENT_BLOCK = 8, 11, 1 << 13, 1 << 14
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # [4, 2]
KEPT_RUNS = 20_000
REVERSE = Style(reverse=True)
BRAILLE = tuple(chr(0x2800 + code) for code in range(256))


def cell_codes(data: MapData, layout: Layout) -> NDArray[np.uint8]:
    """[routers shown, experts shown] codes of single cells."""
    rows = slice(layout.first_router, layout.first_router + layout.routers)
    columns = slice(layout.first_expert, layout.first_expert + layout.experts)
    codes = data.levels[rows, columns] | (data.marks[rows, columns] << MARK_SHIFT)
    router, expert = data.cursor[0] - rows.start, data.cursor[1] - columns.start
    if 0 <= router < layout.routers and 0 <= expert < layout.experts:
        codes[router, expert] |= CURSOR
    exists = np.arange(columns.start, columns.stop) < data.num_experts[rows, None]
    codes[~exists] = ABSENT
    return codes.astype(np.uint8, copy=False)


def half_codes(data: MapData, layout: Layout) -> NDArray[np.uint16]:
    """[rows, experts shown] codes of two cells: the upper one in the low byte."""
    codes = cell_codes(data, layout)
    if len(codes) % 2:
        codes = np.vstack([codes, np.full_like(codes[:1], ABSENT)])
    upper, lower = codes[0::2].astype(np.uint16), codes[1::2].astype(np.uint16)
    return np.bitwise_or(upper, np.left_shift(lower, np.uint16(8)))


def braille_codes(data: MapData, layout: Layout, compare: bool) -> NDArray[np.uint16]:
    """[rows, columns] codes of blocks of 4 routers × 2·merge experts."""
    rows, columns, merge = layout.rows, layout.columns, layout.merge
    cells = cell_codes(data, layout)
    blocks = np.full((rows * 4, columns * 2 * merge), ABSENT, np.uint8)
    blocks[: cells.shape[0], : cells.shape[1]] = cells
    blocks = blocks.reshape(rows, 4, columns, 2, merge)
    absent = blocks == ABSENT
    marks = np.where(absent, 0, (blocks >> MARK_SHIFT) & 3)
    shown = (marks == 1) | (marks == 2) if compare else marks > 0
    dots = np.where(shown.any(axis=4), DOTS[None, :, None, :], 0).sum(axis=(1, 3))
    present = np.maximum(1, (~absent).sum(axis=(1, 3, 4)))
    levels = -(
        -np.where(absent, 0, blocks & 7).astype(int).sum(axis=(1, 3, 4)) // present
    )  # mean, rounded up
    who = (shown & (marks == 1)).any(axis=(1, 3, 4)) | (
        (shown & (marks == 2)).any(axis=(1, 3, 4)) * 2
    )
    cursor = ((blocks & CURSOR) > 0).any(axis=(1, 3, 4))
    gone = absent.all(axis=(1, 3, 4))
    codes = dots | (levels.astype(np.int64) << LEVEL_SHIFT) | (who.astype(np.int64) << WHO_SHIFT)
    codes = codes | np.where(cursor, CURSOR_BLOCK, 0) | np.where(gone, ABSENT_BLOCK, 0)
    packed: NDArray[np.uint16] = codes.astype(np.uint16)
    return packed


class _NarrowRuns(dict[str, Segment]):
    """Runs of cells of one column that share a style, by their codes written as characters.

    A regular expression finds the runs and a look-up their segments: with some seventy runs a row
    this costs a third of what finding them in an array does.
    """

    def __init__(self, tiles: list[tuple[str, Style]], style_bits: int) -> None:
        super().__init__()
        self._tiles = tiles
        alike: dict[int, str] = {}
        for code in range(len(tiles)):
            alike[code & style_bits] = alike.get(code & style_bits, "") + f"\\x{code:02x}"
        self.split = re.compile("|".join(f"[{codes}]+" for codes in alike.values())).findall

    def __missing__(self, run: str) -> Segment:
        text = "".join([self._tiles[ord(char)][0] for char in run])
        segment = self[run] = Segment(text, self._tiles[ord(run[0])][1])
        return segment


class MapBrush:
    """Segments for codes, under one set of pens."""

    def __init__(self, pens: Pens, compare: bool) -> None:
        self.pens = pens
        self.compare = compare
        self._runs: dict[tuple[int, int, int, int, int], list[Segment]] = {}
        self._halves: dict[tuple[int, int], Segment] = {}
        self._blocks: dict[int, Style] = {}
        self._text = pens.style["text"]
        marks = 0 if pens.colours else 3 << MARK_SHIFT  # without colours a mark has its own style
        self._narrow_runs = _NarrowRuns(
            [self._narrow_tile(code) for code in range(ABSENT + 1)], CURSOR | ABSENT | 7 | marks
        )

    def cells(self, codes: NDArray[np.uint8], line: int, wide: int, tall: int) -> list[Segment]:
        """One screen line of a row of cells; `line` counts the lines of a cell from its top."""
        if wide == 1:
            return self._narrow(codes)
        segments: list[Segment] = []
        for code, start, end in _spans(codes):
            key = (code, end - start, line, wide, tall)
            run = self._runs.get(key)
            if run is None:
                run = self._runs[key] = self._cell_run(*key)
            segments += run
        return segments

    def _narrow(self, codes: NDArray[np.uint8]) -> list[Segment]:
        """Cells of one column: a mark is a character in a run of one level, not its own run."""
        runs = self._narrow_runs
        if len(runs) > KEPT_RUNS:
            runs.clear()
        return [runs[run] for run in runs.split(codes.tobytes().decode("latin-1"))]

    def _cell_run(self, code: int, length: int, line: int, wide: int, tall: int) -> list[Segment]:
        if code & ABSENT:
            return [Segment(" " * (wide * length), self._text)]
        tile = self._tile if self.pens.colours else self._shade_tile
        parts = tile(code, line, wide, tall)
        if len(parts) == 1:
            text, style = parts[0]
            return [Segment(text * length, style)]
        return [Segment(text, style) for text, style in parts] * length

    def _narrow_tile(self, code: int) -> tuple[str, Style]:
        if code & ABSENT:
            return " ", self._text
        tile = self._tile if self.pens.colours else self._shade_tile
        return tile(code, 0, 1, 1)[0]

    def _tile(self, code: int, line: int, wide: int, tall: int) -> list[tuple[str, Style]]:
        """A coloured tile with thin gaps: half and quarter blocks make them half a cell wide.

        Tiles of even size end in a whole blank cell, of odd size in half a cell on both sides, so
        that the mark always stands in the middle.
        """
        level = code & 7
        fill, ink = self.pens.load[level], self.pens.load_ink[level]
        if tall > 1 and line == tall - 1:
            if tall % 2 == 0 and tall > 2:
                return [(" " * wide, self._text)]
            return [(_edge_line(wide, "▝▀▘", "▀"), ink)]
        if tall > 1 and tall % 2 and line == 0:
            return [(_edge_line(wide, "▗▄▖", "▄"), ink)]
        middle = line == (tall - 1) // 2
        mark = self._mark(code) if middle else " "
        cursor = bool(code & CURSOR) and middle
        if wide <= 2:
            return [((mark + " ")[:wide], fill + REVERSE if cursor else fill)]
        text = f"[{mark}]" if cursor else mark
        if wide % 2 == 0:
            return [(text.center(wide - 1), fill), (" ", self._text)]
        if wide == 3 and cursor:
            return [(text, fill)]
        return [("▐", ink), (text.center(wide - 2), fill), ("▌", ink)]

    def _shade_tile(self, code: int, line: int, wide: int, tall: int) -> list[tuple[str, Style]]:
        """The same without colours: a shade for the load, the mark over it."""
        level = code & 7
        style = self.pens.load_ink[level]
        if tall > 1 and line == tall - 1:
            return [(" " * wide, self._text)]
        inner = wide if wide <= 2 else wide - 1
        gap = " " * (wide - inner)
        shade, middle = SHADES[level], (tall - 1) // 2
        if not level and inner > 2:  # a row of dots would look like a load
            empty = (shade if line == middle else " ").center(inner)
            if not code >> MARK_SHIFT:
                return [(empty + gap, style)]
            shade = " "
        if line != middle:
            return [(shade * inner + gap, style)]
        mark = self._mark(code)
        cursor = bool(code & CURSOR)
        if mark == " " and not cursor:
            return [(shade * inner + gap, style)]
        strong = self.pens.style["cursor" if cursor else "mark"]
        core = SHADES[level] if mark == " " else mark
        if inner >= 3:
            left = (inner - 1) // 2
            right = shade * (inner - 1 - left)
            if cursor:
                edges = shade * (left - 1)
                return [(edges, style), (f"[{core}]", strong), (right[1:] + gap, style)]
            return [(shade * left, style), (core, strong), (right + gap, style)]
        return [(core, strong), (shade * (inner - 1) + gap, style)]

    def _mark(self, code: int) -> str:
        marks = (" ", PICK_A, PICK_B, PICK_BOTH) if self.compare else (" ", PICK, PICK, PICK)
        return marks[(code >> MARK_SHIFT) & 3]

    def halves(self, codes: NDArray[np.uint16]) -> list[Segment]:
        """One screen line of two routers."""
        segments = []
        for code, start, end in _spans(codes):
            length = end - start
            segment = self._halves.get((code, length))
            if segment is None:
                glyph, style = self._half(code & 0xFF, code >> 8)
                segment = self._halves[(code, length)] = Segment(glyph * length, style)
            segments.append(segment)
        return segments

    def _half(self, upper: int, lower: int) -> tuple[str, Style]:
        if (upper | lower) & CURSOR:
            return ("▲" if upper & CURSOR else "▼"), self.pens.style["cursor"]
        up, down = (bool(code >> MARK_SHIFT & 3) and not code & ABSENT for code in (upper, lower))
        if not self.pens.colours:
            return " ▀▄█"[up + 2 * down], self.pens.style["mark"]
        if up and down:
            return "█", self.pens.style["mark"]
        if up or down:
            under = self._half_colour(lower if up else upper)
            return ("▀" if up else "▄"), self.pens.style["mark"] + Style(bgcolor=under)
        style = Style(color=self._half_colour(upper), bgcolor=self._half_colour(lower))
        return "▀", style

    def _half_colour(self, code: int) -> Color | None:
        return self._text.bgcolor if code & ABSENT else self.pens.ramp[code & 7]

    def blocks(self, codes: NDArray[np.uint16]) -> list[Segment]:
        """One screen line of braille."""
        segments = []
        dots = codes & 0xFF
        for code, start, end in _spans(codes >> LEVEL_SHIFT):
            style = self._blocks.get(code)
            if style is None:
                style = self._blocks[code] = self._block(code << LEVEL_SHIFT)
            text = "".join([BRAILLE[dot] for dot in dots[start:end].tolist()])
            segments.append(Segment(text, style))
        return segments

    def _block(self, code: int) -> Style:
        if code & ABSENT_BLOCK:
            return self._text
        level, who = (code >> LEVEL_SHIFT) & 7, (code >> WHO_SHIFT) & 3
        style = self.pens.load_soft[level]
        if self.compare and who in (1, 2):
            style += Style(color=self.pens.style["good" if who == 1 else "warn"].color)
        return style + REVERSE if code & CURSOR_BLOCK else style


def _edge_line(wide: int, odd: str, even: str) -> str:
    """The upper or lower edge of a tile, as wide as its body."""
    if wide <= 2:
        return even * wide
    if wide % 2 == 0:
        return even * (wide - 1) + " "
    return odd[0] + odd[1] * (wide - 2) + odd[2]


def _spans(codes: NDArray[Any]) -> list[tuple[int, int, int]]:
    """(code, start, end) of equal neighbours."""
    if not len(codes):
        return []
    starts = np.concatenate(([0], np.flatnonzero(codes[1:] != codes[:-1]) + 1))
    ends = np.append(starts[1:], len(codes))
    return list(zip(codes[starts].tolist(), starts.tolist(), ends.tolist(), strict=True))
