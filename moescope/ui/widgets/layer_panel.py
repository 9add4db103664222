"""The layer under the cursor: who was chosen, with what weight, who just was not, and Σ."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import ExpertRow, LayerData
from moescope.ui.ramp import WRONG, thin_bar
from moescope.ui.text import cut, fit, gap, number, wrap
from moescope.ui.widgets.panel import Panel, Row

NOT_RECORDED = "─"
COLUMNS = 25  # rank, expert, score, weight


class LayerPanel(Panel[LayerData]):
    """Ranks, scores, weights and load; the runner-up; the sums."""

    EMPTY = "no router at the cursor yet"

    def labels(self, data: LayerData) -> tuple[str, str]:
        return data.title, data.router

    def draw(self, data: LayerData, width: int, height: int) -> Sequence[Row]:
        foot = footer(data, width)
        room = max(1, height - 1 - len(foot) - (data.runner_up is not None))
        rows: list[Row] = [head(data, width)]
        rows += [expert_row(row, width) for row in data.rows[:room]]
        if len(data.rows) > room:
            rows[-1] = ((f"    … {len(data.rows) - room + 1} more", "dim"),)
        if data.runner_up is not None:
            rows.append(runner_up_row(data, width))
        spare = height - len(rows) - len(foot)
        return [*rows, *([()] if spare > 0 else []), *foot]


def head(data: LayerData, width: int) -> Row:
    load = f"load ÷ busiest, last {data.window} tokens"
    return (
        (fit(" #  expert  score  weight  ", COLUMNS + 2) + cut(load, width - COLUMNS - 2), "dim"),
    )


def expert_row(row: ExpertRow, width: int) -> Row:
    room = max(0, min(40, width - COLUMNS - 2 - 5))
    return (
        (f"{row.rank:>2}  ", "dim"),
        (f"E{row.expert:03d}   ", "strong"),
        (f"{number(row.score):>5}   ", "text"),
        (f"{number(row.weight):>5}   ", "text"),
        (thin_bar(row.load, room), "bar"),
        (f" {number(row.load, 2)}", "dim"),
    )


def runner_up_row(data: LayerData, width: int) -> Row:
    row = data.runner_up
    assert row is not None
    chosen = len(data.rows)
    margin = f"Δ {gap(data.margin)} {data.margin_unit} to #{chosen}"
    spans = [
        (
            f"{chosen + 1:>2}  E{row.expert:03d}   {number(row.score):>5}   {NOT_RECORDED:>5}   ",
            "dim",
        ),
        (cut(margin, width - COLUMNS), "text"),
    ]
    if data.near_tie:
        spans.append(("  ≈ near tie", "warn"))
    return tuple(spans)


def footer(data: LayerData, width: int) -> list[Row]:
    """The sums and what stands behind them."""
    first: list[tuple[str, str]] = [
        ("Σ ", "strong"),
        (number(data.score_sum), "wrong" if data.sum_wrong else "strong"),
    ]
    if data.sum_wrong:
        first.append((f" {WRONG}", "wrong"))
    if data.sum_expected:
        first.append((f"  {data.sum_expected}", "wrong" if data.sum_wrong else "dim"))
    if data.sum_range is not None:
        first.append(
            (f"  p10 {number(data.sum_range[0], 2)} p90 {number(data.sum_range[1], 2)}", "dim")
        )
    facts = [
        f"mass {number(data.mass)}",
        f"entropy {number(data.entropy, 2)} nats",
        f"load CV {number(data.load_cv, 2)}",
        f"dead {data.dead if data.dead is not None else NOT_RECORDED}",
    ]
    rows: list[Row] = [tuple(first)]
    rows += [((line, "dim"),) for line in wrap("   ".join(facts), width)]
    rows.append(((cut(data.basis, width), "dim"),))
    return rows
