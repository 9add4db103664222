"""The numbers beside two lanes."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import AgreementData
from moescope.ui.text import fit, wrap
from moescope.ui.widgets.panel import Panel, Row


class AgreementPanel(Panel[AgreementData]):
    """One row a measure: this token, and the run; the verdict below."""

    def labels(self, data: AgreementData) -> tuple[str, str]:
        return data.title, ""

    def draw(self, data: AgreementData, width: int, height: int) -> Sequence[Row]:
        side = max(8, min(14, width // 4))
        label = max(1, width - 2 * side)
        rows: list[Row] = [
            ((" " * label + fit("this token", side, ">") + fit("run", side, ">"), "dim"),)
        ]
        for row in data.rows:
            rows.append(
                (
                    (fit(row.label, label), "text"),
                    (fit(row.this_token, side, ">"), "strong"),
                    (fit(row.run, side, ">"), "text"),
                )
            )
        verdict = [((line.strip(), "strong"),) for line in wrap(data.verdict, width)]
        room = len(rows) + len(verdict) < height
        return [*rows, *([()] if room else []), *verdict]
