"""The token under the cursor: how likely it was, what else it could have been, its routing."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import TokenData
from moescope.ui.text import number, wrap
from moescope.ui.widgets.panel import Panel, Row


class TokenPanel(Panel[TokenData]):
    """Probability, alternatives, routing facts, what other variants would have done."""

    EMPTY = "no token yet"

    def labels(self, data: TokenData) -> tuple[str, str]:
        return data.title, ""

    def draw(self, data: TokenData, width: int, height: int) -> Sequence[Row]:
        rank = "─" if data.rank is None else str(data.rank)
        rows: list[Row] = [
            ((f"id {data.token_id}   p {number(data.probability)}   rank {rank}", "text"),)
        ]
        if data.alternatives:
            text = "  ".join(f"“{piece}” {number(p, 2)}" for piece, p in data.alternatives)
            rows += [((line, "dim"),) for line in wrap("else " + text, width)[:2]]
        rows.append(())
        for label, value in facts(data):
            rows.append(((label, "dim"), (value.rjust(max(1, width - len(label))), "text")))
        if data.variants:
            rows.append(())
        for line in data.variants:
            rows += [((part, "text"),) for part in wrap(line, width)]
        return rows


def facts(data: TokenData) -> list[tuple[str, str]]:
    """Label and value of each routing fact that is known."""
    pairs = [
        ("experts shared with the token before", data.shared_with_previous),
        (f"routers with a near tie (Δ < {data.near_tie_below:g})", data.near_ties),
    ]
    known = [(label, f"{pair[0]}/{pair[1]}") for label, pair in pairs if pair is not None]
    if data.new_experts is not None:
        known.append(("experts first used here", str(data.new_experts)))
    return known
