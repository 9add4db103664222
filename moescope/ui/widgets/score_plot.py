"""A measure over positions: one or more lines, a guide, the cursor.

plotext draws each line in braille; axes, guide, cursor and labels are ours, because they are few
and must line up with the rest. plotext holds one figure for the whole process: it is cleared before
use, and only the screen's thread draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.ui.panels import PlotData
from moescope.ui.text import cells, cut, fit, number
from moescope.ui.widgets.panel import Panel, Row, Span

BLANK, LAST_BRAILLE = "\u2800", "\u28ff"
SERIES_PENS = ("bar", "accent", "good", "warn")
STEPS = (1.0, 2.0, 5.0, 10.0)
MOST_STEPS = 6  # between the ends of the axis; always an even number, so that the middle is round
AXIS = 6  # columns of the axis: figures and the line
GUIDE, CURSOR = "┄", "│"
Grid = list[list[Span]]  # [rows][columns] one character and its pen


class ScorePlot(Panel[PlotData]):
    """Σ, or another measure, over the tokens."""

    EMPTY = "nothing to plot yet"

    def labels(self, data: PlotData) -> tuple[str, str]:
        return data.title, value_at_cursor(data)

    def draw(self, data: PlotData, width: int, height: int) -> Sequence[Row]:
        known = [values for _, values in data.series if np.isfinite(values).any()]
        if not known or not len(data.x) or height < 2 or width < AXIS + 8:
            return (((cut(self.EMPTY, width), "dim"),),)
        low, high = limits(known, data.guide)
        if data.bounds is not None:
            low, high = max(low, data.bounds[0]), min(high, data.bounds[1])
        margin = min(8, max(cells(tag) for tag in tags(data))) + 1
        rows = height - 1 if height >= 4 else height
        grid = canvas(data, width - AXIS - margin, rows, low, high)
        ends = end_tags(data, rows, low, high)
        lines: list[Row] = []
        for y in range(rows):
            axis = tick(y, rows, low, high)
            tag, pen = ends.get(y, ("", "text"))
            lines.append(((axis, "dim"), *merged(grid[y]), (fit(f" {tag}", margin), pen)))
        if rows < height:
            lines.append(((positions(data, width, margin), "dim"),))
        return lines


def value_at_cursor(data: PlotData) -> str:
    """The values under the cursor, or the newest."""
    if not len(data.x):
        return ""
    at = len(data.x) - 1
    if data.cursor is not None:
        at = int(np.searchsorted(data.x, data.cursor))
        if at >= len(data.x) or data.x[at] != data.cursor:
            return ""
    figures = " / ".join(number(float(values[at])) for _, values in data.series)
    return f"@{int(data.x[at])} {figures}"


def limits(
    series: Sequence[NDArray[np.float32]], guide: float | None = None
) -> tuple[float, float]:
    """Round ends of the axis around all finite values and the guide."""
    values = np.concatenate([values[np.isfinite(values)] for values in series]).astype(float)
    low, high = float(values.min()), float(values.max())
    if guide is not None:
        low, high = min(low, guide), max(high, guide)
    if high - low < 1e-6 * max(1.0, abs(high)):
        pad = max(0.05, abs(high) * 0.05)
        low, high = low - pad, high + pad
    scale = 10.0 ** math.floor(math.log10((high - low) / MOST_STEPS))
    for step in (scale * size for size in STEPS):
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        if (last - first) % 2:
            first, last = (first - 1, last) if first > 0 else (first, last + 1)
        if last - first <= MOST_STEPS:
            break
    return first * step, last * step


def tick(y: int, rows: int, low: float, high: float) -> str:
    """The axis of one row: figures at the ends and, where there is room, between them."""
    parts = 4 if rows >= 9 else 2 if rows >= 5 else 1
    values = {
        round(part / parts * (rows - 1)): high - (high - low) * part / parts
        for part in range(parts + 1)
    }
    if y not in values:
        return fit("│", AXIS - 1, ">") + " "
    return fit(number(values[y], 2), AXIS - 2, ">") + "┤ "


def tags(data: PlotData) -> list[str]:
    """What stands at the right end of each line: its name, or its last value where it is alone."""
    if len(data.series) > 1:
        return [label for label, _ in data.series]
    finite = data.series[0][1][np.isfinite(data.series[0][1])]
    return [number(float(finite[-1]), 2) if len(finite) else ""]


def end_tags(data: PlotData, rows: int, low: float, high: float) -> dict[int, Span]:
    """Row of each tag: that of the line's last value, moved on where two would meet."""
    placed: dict[int, Span] = {}
    for index, ((_, values), tag) in enumerate(zip(data.series, tags(data), strict=True)):
        finite = values[np.isfinite(values)]
        if not len(finite):
            continue
        y = row_of(float(finite[-1]), rows, low, high)
        free = sorted(range(rows), key=lambda row: abs(row - y))
        spot = next((row for row in free if row not in placed), None)
        if spot is not None:
            placed[spot] = (tag, SERIES_PENS[index % len(SERIES_PENS)])
    return placed


def positions(data: PlotData, width: int, margin: int) -> str:
    """The line below: first and last position."""
    first, last = str(int(data.x[0])), str(int(data.x[-1]))
    room = width - AXIS - margin
    if cells(first) + cells(last) + 1 > room:
        return " " * AXIS + fit(first, room)
    return " " * AXIS + first + " " * (room - cells(first) - cells(last)) + last


def row_of(value: float, rows: int, low: float, high: float) -> int:
    return min(rows - 1, max(0, int((high - value) / (high - low) * rows)))


def canvas(data: PlotData, width: int, rows: int, low: float, high: float) -> Grid:
    """Guide and cursor first, then the lines over them."""
    grid: Grid = [[(" ", "text")] * width for _ in range(rows)]
    first, last = int(data.x[0]), int(data.x[-1])
    if data.guide is not None:
        y = row_of(data.guide, rows, low, high)
        grid[y] = [(GUIDE, "rule")] * width
    if data.cursor is not None and first <= data.cursor <= last:
        share = (data.cursor - first) / max(1, last - first)
        x = round(share * (width - 1))
        for row in grid:
            row[x] = (CURSOR, "rule")
    for index, (_, values) in enumerate(data.series):
        pen = SERIES_PENS[index % len(SERIES_PENS)]
        for row, text in zip(grid, braille(data.x, values, width, rows, low, high), strict=False):
            for x, char in enumerate(text[:width]):
                if char not in (" ", BLANK):
                    row[x] = (overlaid(row[x][0], char), pen)
    return grid


def overlaid(below: str, above: str) -> str:
    """Two braille characters in one cell; anything else gives way."""
    if BLANK <= below <= LAST_BRAILLE and BLANK <= above <= LAST_BRAILLE:
        return chr(ord(below) | ord(above))
    return above


def braille(
    x: NDArray[np.int64],
    values: NDArray[np.float32],
    width: int,
    rows: int,
    low: float,
    high: float,
) -> list[str]:
    """One line as braille text, by plotext; a gap wherever a value is unknown."""
    from plotext import figure, terminal, uncolorize

    terminal.limit(False, False)  # or it would be cut to the size of the terminal
    first, last = int(x[0]), int(x[-1])
    figure.clear()
    figure.plot_size(width, rows)
    figure.theme("colorless")
    figure.axes(False)
    figure.ruler("both", "both").ticks([])
    figure.ruler("x", "lower").lim(first, max(last, first + 1))
    figure.ruler("y", "left").lim(low, high)
    for xs, ys in runs(x, values, 2 * width):
        signal = figure.signal(xs, ys, marker="braille")
        figure.draw(signal.lines() if len(xs) > 1 else signal)
    text = uncolorize(figure.build().string())
    return [line.ljust(width) for line in str(text).split("\n")[:rows]]


def runs(
    x: NDArray[np.int64], values: NDArray[np.float32], columns: int
) -> list[tuple[list[float], list[float]]]:
    """Stretches without gaps, thinned to the least and the greatest value of each dot column."""
    finite = np.isfinite(values)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], finite.astype(np.int8), [0]))))
    stretches = []
    per_bin = max(1, -(-len(x) // columns))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        xs, ys = x[start:end].astype(float), values[start:end].astype(float)
        if per_bin > 2:
            keep = set()
            for at in range(0, len(ys), per_bin):
                part = ys[at : at + per_bin]
                keep |= {at + int(part.argmin()), at + int(part.argmax())}
            kept = sorted(keep)
            xs, ys = xs[kept], ys[kept]
        stretches.append((xs.tolist(), ys.tolist()))
    return stretches


def merged(row: list[Span]) -> list[Span]:
    """Neighbours of one pen as one span."""
    spans: list[Span] = []
    for char, pen in row:
        if spans and spans[-1][1] == pen:
            spans[-1] = (spans[-1][0] + char, pen)
        else:
            spans.append((char, pen))
    return spans
