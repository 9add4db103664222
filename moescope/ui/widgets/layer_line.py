"""The layer under the cursor in one line, for small terminals."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import LayerData
from moescope.ui.ramp import WRONG
from moescope.ui.text import cells, gap, number
from moescope.ui.widgets.panel import Panel, Row, Span


class LayerLine(Panel[LayerData]):
    """`layer 17  E062 .16 E096 .12 …  Σ 0.731  Δ 0.001 score ≈ tie`: weights, and what they sum to;
    scores only where no weights were recorded, and then it says so."""

    DEFAULT_CSS = "LayerLine { height: 1; border: none; } LayerLine:focus { border: none; }"

    def draw(self, data: LayerData, width: int, height: int) -> Sequence[Row]:
        tail: list[Span] = [("  Σ ", "strong")]
        tail.append((number(data.score_sum), "wrong" if data.sum_wrong else "strong"))
        if data.sum_wrong:
            tail.append((WRONG, "wrong"))
        if data.margin is not None:
            tail.append((f"  Δ {gap(data.margin)} {data.margin_unit}", "dim"))
        if data.near_tie:
            tail.append((" ≈ tie", "warn"))
        weighed = any(row.weight is not None for row in data.rows)
        known = weighed or any(row.score is not None for row in data.rows)
        head: list[Span] = [(f" {data.title} ", "strong")]
        head += [(" scores", "dim")] if known and not weighed else []
        room = width - sum(cells(text) for text, _ in (*head, *tail)) - 2
        for row in data.rows:
            value = row.weight if weighed else row.score
            item = f" E{row.expert:03d} " + number(value, 2).lstrip("0")
            if cells(item) > room:
                head.append((" …", "dim"))
                break
            head.append((item, "text"))
            room -= cells(item)
        return (tuple(head + tail),)
