"""The line on top: what is loaded, what it is doing, how fast."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.ui.panels import StatusData
from moescope.ui.ramp import WRONG
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

LEFT = ("name", "shape", "backend")
RIGHT = ("rate", "position", "memory", "cursor", "frames_per_second")
EXPENDABLE = ("frames_per_second", "backend", "memory", "word", "cursor", "shape", "position")


class StatusLine(Panel[StatusData]):
    """Name and shape at the left, mode, rate, position and memory at the right."""

    DEFAULT_CSS = "StatusLine { height: 1; border: none; } StatusLine:focus { border: none; }"

    def draw(self, data: StatusData, width: int, height: int) -> Sequence[Row]:
        glyph, word, pen = MODES[data.mode]
        trouble = cut(f"  {WRONG} {data.trouble}", width * 3 // 5) if data.trouble else ""
        parts = {name: getattr(data, name) for name in (*LEFT, *RIGHT)}
        parts["word"] = word
        for name in ("", *EXPENDABLE):
            parts[name] = ""
            left = "  ".join(parts[key] for key in LEFT if parts[key])
            right = "  ".join(parts[key] for key in RIGHT if parts[key])
            mode = f"{glyph} {parts['word']}".strip()
            room = width - cells(mode) - cells(trouble) - cells(right) - 5
            if cells(left) <= room:
                break
        left = cut(left, max(0, room))
        rest = left[len(data.name) :] if left.startswith(data.name) else ""
        gap = " " * (room - cells(left) + 1)
        return (
            (
                (f" {left[: len(left) - len(rest)]}", "strong"),
                (rest, "soft"),
                (gap, "text"),
                (mode, pen),
                (trouble, "wrong"),
                (f"  {right} ", "text"),
            ),
        )
