"""The layer under the cursor in one line, for small terminals."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import LayerData
from moescope.ui.ramp import WRONG
from moescope.ui.text import cells, gap, number
from moescope.ui.widgets.panel import Panel, Row, Span


class LayerLine(Panel[LayerData]):
    """`L17  E062 .16 E096 .12 …  Σ .731  9th Δ .001 tie`."""

    DEFAULT_CSS = "LayerLine { height: 1; border: none; } LayerLine:focus { border: none; }"

    def draw(self, data: LayerData, width: int, height: int) -> Sequence[Row]:
        tail: list[Span] = [("  Σ ", "strong")]
        tail.append((number(data.score_sum), "wrong" if data.sum_wrong else "strong"))
        if data.sum_wrong:
            tail.append((WRONG, "wrong"))
        if data.margin is not None:
            tail.append((f"  Δ {gap(data.margin)}", "dim"))
        if data.near_tie:
            tail.append((" ≈ tie", "warn"))
        head: list[Span] = [(f" {data.title} ", "strong")]
        room = width - sum(cells(text) for text, _ in (*head, *tail)) - 2
        for row in data.rows:
            value = row.score if row.score is not None else row.weight
            item = f" E{row.expert:03d} " + number(value, 2).lstrip("0")
            if cells(item) > room:
                head.append((" …", "dim"))
                break
            head.append((item, "text"))
            room -= cells(item)
        return (tuple(head + tail),)
