"""The token under the cursor: how likely it was, what else it could have been, its routing."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import TokenData
from moescope.ui.ramp import thin_bar
from moescope.ui.text import cells, fit, number, wrap
from moescope.ui.widgets.panel import Panel, Row

UNKNOWN = "─"


class TokenPanel(Panel[TokenData]):
    """Probability, alternatives, routing facts, what other variants would have done."""

    EMPTY = "no token yet"

    def labels(self, data: TokenData) -> tuple[str, str]:
        return data.title, ""

    def draw(self, data: TokenData, width: int, height: int) -> Sequence[Row]:
        rank = UNKNOWN if data.rank is None else str(data.rank)
        rows: list[Row] = [
            (
                ("id ", "dim"),
                (str(data.token_id), "text"),
                ("   p ", "dim"),
                (number(data.probability), "strong"),
                ("   rank ", "dim"),
                (rank, "text"),
            )
        ]
        below: list[Row] = [
            (
                (fit(label, max(1, width - cells(value) - 1)), "dim"),
                (f" {value}", "text"),
            )
            for label, value in facts(data)
        ]
        below += [((line, "soft"),) for text in data.variants for line in wrap(text, width)]
        spare = height - len(rows) - len(below)
        rows += alternatives(data.alternatives, width, max(1, spare - 2))
        if height > len(rows) + len(below):
            rows.append(())
        return rows + below


def alternatives(items: Sequence[tuple[str, float]], width: int, room: int) -> list[Row]:
    """What else was likely, one a row: text, probability, a bar of the same scale."""
    text_width = max(4, min(14, width // 3))
    bar_width = max(0, width - text_width - 8)
    return [
        (
            (fit(f"“{text}”", text_width), "text"),
            (f" {number(share, 2):>5}  ", "dim"),
            (thin_bar(share, bar_width), "bar"),
        )
        for text, share in items[:room]
    ]


def facts(data: TokenData) -> list[tuple[str, str]]:
    """Label and value of each routing fact that is known."""
    pairs = [
        ("picks shared with the token before", data.shared_with_previous),
        (f"routers with a near tie (within {100 * data.near_tie_below:g} %)", data.near_ties),
    ]
    known = [(label, f"{pair[0]}/{pair[1]}") for label, pair in pairs if pair is not None]
    if data.new_experts is not None:
        known.append(("experts first used here", str(data.new_experts)))
    return known
