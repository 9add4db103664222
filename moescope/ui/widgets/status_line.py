"""The line on top: what is loaded, what it is doing, how fast."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import StatusData
from moescope.ui.text import cells, cut
from moescope.ui.widgets.panel import Panel, Row

MODES = {
    "loading": ("◌", "loading", "dim"),
    "idle": ("○", "ready", "dim"),
    "prefill": ("◐", "reading the prompt", "warn"),
    "running": ("●", "", "good"),
    "paused": ("‖", "paused", "warn"),
    "replay": ("▶", "replay", "accent"),
    "failed": ("✗", "failed", "wrong"),
}


class StatusLine(Panel[StatusData]):
    """Name and shape at the left, mode, rate, position and memory at the right."""

    DEFAULT_CSS = "StatusLine { height: 1; border: none; } StatusLine:focus { border: none; }"

    def draw(self, data: StatusData, width: int, height: int) -> Sequence[Row]:
        glyph, word, pen = MODES[data.mode]
        mode = f"{glyph} {word}".strip()
        tails = [data.rate, data.position, data.memory, data.cursor, data.frames_per_second]
        right = "  ".join(part for part in tails if part)
        left = "  ".join(part for part in (data.name, data.shape, data.backend) if part)
        room = width - cells(mode) - cells(right) - 5
        left = cut(left, room)
        gap = max(1, width - cells(left) - cells(mode) - cells(right) - 4)
        return (
            ((f" {left}", "strong"), (" " * gap, "text"), (mode, pen), (f"  {right} ", "text")),
        )
