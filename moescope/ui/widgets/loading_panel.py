"""What is being read, and how far."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import LoadingData
from moescope.ui.ramp import bar
from moescope.ui.text import cut
from moescope.ui.widgets.panel import Panel, Row


class LoadingPanel(Panel[LoadingData]):
    """Stage, what, a bar, bytes, and the checkpoint's warnings."""

    def labels(self, data: LoadingData) -> tuple[str, str]:
        return "loading", ""

    def draw(self, data: LoadingData, width: int, height: int) -> Sequence[Row]:
        rows: list[Row] = [((cut(data.stage, width), "strong"),), ((cut(data.what, width), "dim"),)]
        if data.total:
            share = data.done / data.total
            room = max(1, width - 24)
            rows.append(
                (
                    (bar(share, room), "bar"),
                    (f" {amount(data.done)} of {amount(data.total)}", "text"),
                )
            )
        elif data.done:
            rows.append(((amount(data.done), "text"),))
        rows += [((cut(note, width), "warn"),) for note in data.notes]
        return rows


def amount(size: int) -> str:
    """Bytes as people write them: `512 kB`, `17.2 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
