"""What is being read, and how far."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import LoadingData
from moescope.ui.ramp import thin_bar
from moescope.ui.text import cut, wrap
from moescope.ui.widgets.panel import Panel, Row


class LoadingPanel(Panel[LoadingData]):
    """Stage, what, a bar, bytes, and the checkpoint's warnings."""

    def labels(self, data: LoadingData) -> tuple[str, str]:
        return "loading", ""

    def draw(self, data: LoadingData, width: int, height: int) -> Sequence[Row]:
        rows: list[Row] = [((cut(data.stage, width), "strong"),), ((cut(data.what, width), "dim"),)]
        if data.total:
            share = data.done / data.total
            filled = thin_bar(share, width).rstrip()
            rows.append(((filled, "bar"), ("─" * (width - len(filled)), "rule")))
            size = f"{amount(data.done)} of {amount(data.total)}"
            rows.append(((size, "text"), (f"   {share:.0%}", "dim")))
        elif data.done:
            rows.append(((amount(data.done), "text"),))
        if data.notes:
            rows.append(())
        for note in data.notes:
            lines = wrap(note, max(1, width - 2))
            rows += [
                (("! " if not at else "  ", "warn"), (line, "text"))
                for at, line in enumerate(lines)
            ]
        return rows


def amount(size: int) -> str:
    """Bytes as people write them: `512 kB`, `17.2 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
