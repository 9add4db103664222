"""The compare screen's own panels: the bar of lanes, and the table of layers."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.compare_layers import GateData, LanesData, LayerPair, LayersData
from moescope.ui.ramp import WRONG
from moescope.ui.routers import one_unit
from moescope.ui.text import cells, cut, fit, gap, number
from moescope.ui.widgets.panel import Panel, Row, Span

LEAD = " lanes"
SHORTEST = 7  # cells of a title below which the letter says as much
# heading, width, what goes first where there is no room (smallest goes first)
COLUMNS = (
    ("layer", 6, 9),
    ("differ", 8, 8),
    ("why", 10, 5),
    ("Δ {unit}", 9, 6),
    ("Σ {0}", 8, 7),
    ("Σ {1}", 8, 7),
    ("same, run", 11, 4),
    ("flips", 7, 3),
)
WHY = {"gate": "gate", "input": "input", "either": "either", "together": "together", "": ""}


class LanesBar(Panel[LanesData]):
    """`A trained   B softmax over the selected 63 % ≠@10   …   free text`."""

    DEFAULT_CSS = "LanesBar { height: 1; border: none; }"

    def draw(self, data: LanesData, width: int, height: int) -> Sequence[Row]:
        mode = f" {data.mode} "
        items = entries(data, width - cells(LEAD) - cells(mode))
        spans: list[Span] = [(LEAD, "dim")]
        for item, (name, found) in zip(data.items, items, strict=True):
            spans += [("  ", "text"), (name, "cursor" if item.shown else "text")]
            spans += [(f" {found}", "dim")] if found else []
        used = sum(cells(text) for text, _ in spans) + cells(mode)
        return ((*spans, (" " * max(0, width - used), "text"), (mode, "accent")),)


def entries(data: LanesData, room: int) -> list[tuple[str, str]]:
    """(letter and title, how it stands) of every lane: titles are cut alike, then left out, and at
    last only the share stands beside the letter."""
    longest = max((cells(item.title) for item in data.items), default=0)
    for limit in (*range(longest, SHORTEST, -1), 0):
        found = [
            (f"{item.letter} {cut(item.title, limit)}".rstrip(), item.found) for item in data.items
        ]
        if sum(2 + cells(name) + cells(said) + bool(said) for name, said in found) <= room:
            return found
    return [(item.letter, item.found.partition(" ")[0]) for item in data.items]


class LayersPanel(Panel[LayersData]):
    """One row a router: where this token's experts differ and why, Σ of both, the run."""

    EMPTY = "nothing to compare yet"

    def labels(self, data: LayersData) -> tuple[str, str]:
        return data.title, data.note

    def draw(self, data: LayersData, width: int, height: int) -> Sequence[Row]:
        columns = fitting(width)
        unit = one_unit(row.margin_unit for row in data.rows)
        heads = (
            fit(title.format(*data.letters, unit=unit).rstrip(), size, ">")
            for title, size, _ in columns
        )
        rows: list[Row] = [(("".join(heads), "dim"),)]
        room = max(1, height - 1)
        first = max(0, min(data.cursor - room // 2, len(data.rows) - room))
        for at in range(first, min(len(data.rows), first + room)):
            rows.append(layer_row(data.rows[at], at == data.cursor, columns, bool(unit)))
        return rows


class GatePanel(Panel[GateData]):
    """Rows of a gate, those first that turned most decisions."""

    EMPTY = "nothing to compare yet"

    def labels(self, data: GateData) -> tuple[str, str]:
        return data.title, ""

    def draw(self, data: GateData, width: int, height: int) -> Sequence[Row]:
        rows: list[Row] = [((cut(data.said, width), "text"),)]
        if not data.rows:
            return rows
        most = data.rows[0][1]
        bar = max(0, min(24, width - 42))
        head = fit("row", 10) + fit("flips turned", 14, ">") + fit("logit off by", 14, ">")
        rows.append(((cut(head, width), "dim"),))
        room = max(1, height - 2)
        shown = data.rows[: room if len(data.rows) <= room else room - 1]
        for place, flips, error in shown:
            rows.append(
                (
                    (fit(place, 10), "strong"),
                    (fit(str(flips), 14, ">"), "text"),
                    (fit(f"{error:.3f}", 14, ">"), "text"),
                    ("  " + "━" * round(bar * flips / most), "accent"),
                )
            )
        if len(data.rows) > len(shown):
            rows.append(((cut(f"and {len(data.rows) - len(shown)} more rows", width), "dim"),))
        return rows


def fitting(width: int) -> list[tuple[str, int, int]]:
    """The columns there is room for."""
    kept = list(COLUMNS)
    while len(kept) > 1 and sum(size for _, size, _ in kept) > width:
        kept.remove(min(kept, key=lambda column: column[2]))
    return kept


def layer_row(
    row: LayerPair, here: bool, columns: Sequence[tuple[str, int, int]], alike: bool = True
) -> Row:
    """`▸01   ≠2/4     input   .002≈    0.54    1.00‼      63 %    12`. Margins that are not `alike`
    have their unit's first letter each; else the heading names it."""
    if row.differ:
        differ, pen = f"≠{row.differ}/{row.of}", "warn"
    else:
        differ, pen = ("same", "dim") if row.of else ("─", "dim")
    shown: dict[str, Span] = {
        "layer": (("▸" if here else " ") + row.label, "accent" if here else "strong"),
        "differ": (differ, pen),
        "why": (WHY[row.why], "text"),
        "Δ {unit}": (
            gap(row.margin).lstrip("0")
            + ("" if alike else f" {row.margin_unit[:1]}")
            + ("≈" if row.near_tie else " "),
            "warn" if row.near_tie else "text",
        ),
        "same, run": ("─" if row.same is None else f"{row.same:.0%}", "text"),
        "flips": (str(row.flips), "dim"),
    }
    for at in (0, 1):
        text = number(row.sums[at], 2) + (WRONG if row.wrong[at] else " ")
        shown[f"Σ {{{at}}}"] = (text, "wrong" if row.wrong[at] else "text")
    return tuple((fit(shown[title][0], size, ">"), shown[title][1]) for title, size, _ in columns)
