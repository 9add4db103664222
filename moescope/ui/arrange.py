"""Where the panels of the main screen go, from the terminal's size and the model's. Pure.

The map comes first: it gets the largest cells that leave room for the rest, and panels that do not
fit are left out, the least telling first. Letters: L routers, E expert classes, K picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moescope.ui.widgets.map_layout import plan

NEEDS = (60, 16)  # columns, rows below which nothing useful fits
NARROW = 104  # columns from which two columns of panels fit
MAP_FRAME = (12, 3)  # columns and rows of a map that are not cells: border, ruler, labels, sums
BARE_MAP_FRAME = (10, 1)  # without a border
LEGEND = 2  # rows: a blank one and the colours
TILES = (3, 2, 1)  # rows a router may take when there is room
TEXT_ROWS = 5  # the least a transcript needs
SUMS_ROWS = 6  # the least a plot needs, border included
LAYER_ROWS = 11  # the least the layer panel needs: ranks are cut, the runner-up and Σ stay
TOKEN_ROWS = 16
RIGHT = 44  # columns of text and token panel, at least
ZOOM_CELLS = {"cell": (1.0, 1.0), "half": (1.0, 0.5), "braille": (0.5, 0.25)}  # per expert, router


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Sizes in cells, borders included. `kind` is `column` (one under the other), `two` (map, layer
    and sums left) or `lone` (the map alone left). `out` names the panels that have no room."""

    kind: Literal["column", "two", "lone"]
    left: int
    map_height: int
    layer_height: int
    out: frozenset[str] = frozenset()


def cells_of(zoom: str, routers: int, experts: int) -> tuple[int, int]:
    """Columns and rows of the map's cells in one zoom."""
    across, down = ZOOM_CELLS[zoom]
    return -(-int(experts * across * 2) // 2), -(-int(routers * down * 4) // 4)


def arrange(
    width: int, height: int, routers: int, experts: int, top_k: int, zoom: str = "auto"
) -> Arrangement:
    """Place the panels in `width` × `height` cells (status, bars and footer already taken off)."""
    zooms = tuple(ZOOM_CELLS) if zoom == "auto" else (zoom,)
    if width < NARROW:
        room = height - TEXT_ROWS - 2 - BARE_MAP_FRAME[1]
        rows = _rows(zooms, routers, experts, width - BARE_MAP_FRAME[0], room)
        rows = _tiled(rows, routers, min(room, height // 2))
        return Arrangement("column", width, rows + BARE_MAP_FRAME[1], 1)
    layer = min(top_k, 10) + 7
    left = max(min(width * 5 // 8, width - RIGHT), 60)
    out = set() if height >= TOKEN_ROWS + TEXT_ROWS + 3 else {"token"}
    if _fits_alone(width, height, routers, experts, layer) and "cell" in zooms:
        return Arrangement("lone", experts + MAP_FRAME[0] + 2, height, layer, frozenset(out))
    least = _rows(zooms, routers, experts, left - MAP_FRAME[0], height) + MAP_FRAME[1]
    least = min(least, -(-routers // 4) + MAP_FRAME[1], height * 2 // 3)
    for gone, share in (("", SUMS_ROWS), ("sums", 0)):
        if height - least - share >= LAYER_ROWS:
            layer = min(layer, height - least - share)
            out |= {gone} - {""}
            break
    else:
        out |= {"layer", "sums"}
    used = (1 if "layer" in out else layer) + (0 if "sums" in out else SUMS_ROWS)
    room = max(height - used - MAP_FRAME[1], 4)
    rows = _tiled(_rows(zooms, routers, experts, left - MAP_FRAME[0], room), routers, room)
    drawn = _drawn(left - 2, rows + 1, routers, experts, zoom) - 1
    rows = room if "sums" in out else drawn  # where nobody below takes the rest
    return Arrangement("two", left, rows + MAP_FRAME[1], layer, frozenset(out))


def _fits_alone(width: int, height: int, routers: int, experts: int, layer: int) -> bool:
    """Whether a tall model fits in full cells beside a column that holds all the rest."""
    across = width - RIGHT - 10 >= experts + MAP_FRAME[0]
    down = height >= routers + MAP_FRAME[1] and height >= layer + TOKEN_ROWS + SUMS_ROWS + TEXT_ROWS
    return across and down and routers > height // 2


def _drawn(across: int, down: int, routers: int, experts: int, zoom: str) -> int:
    """Rows that the map makes use of, ruler and legend included, out of `down`."""
    found = plan(across, down, routers, experts, (0, 0), zoom=zoom)
    return min(down, 1 + found.rows + (LEGEND if found.legend else 0))


def _tiled(rows: int, routers: int, room: int) -> int:
    """Rows of the map, each router as tall as there is room for, and a legend where one fits."""
    if rows == routers:
        rows = next((rows * tile for tile in TILES if rows * tile + LEGEND <= room), rows)
    return rows + LEGEND if rows + LEGEND <= room else rows


def _rows(zooms: tuple[str, ...], routers: int, experts: int, across: int, down: int) -> int:
    """Rows of the largest zoom that fits, or all the room there is."""
    rows = 1
    for zoom in zooms:
        columns, rows = cells_of(zoom, routers, experts)
        if columns <= across and rows <= down:
            return rows
    return max(1, min(rows, down))
