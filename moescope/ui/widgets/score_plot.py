"""A measure over positions: one or two lines, a guide, a cursor."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import PlotData
from moescope.ui.widgets.panel import Panel, Row


class ScorePlot(Panel[PlotData]):
    """Σ (or another measure) over the tokens."""

    EMPTY = "nothing to plot yet"

    def labels(self, data: PlotData) -> tuple[str, str]:
        return data.title, ""

    def draw(self, data: PlotData, width: int, height: int) -> Sequence[Row]:
        return ()
