"""What the screen costs on the model of the decode benchmark: `screen_cost.py` on other weights."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import screen_cost
from asked import Asked

Figures = dict[str, Any]
TARGET = 0.90  # of headless decode


def run(asked: Asked) -> Figures:
    """Ratios of token rates, screen drawing over screen stopped, in pairs of windows."""
    few = asked.rounds == 1
    windows, seconds = (2, 1.0) if few else (8, 3.0)
    with tempfile.TemporaryDirectory() as name, measure.Meter() as meter:
        trace = Path(name) / "watched.moetrace"
        ratios = screen_cost.measure(asked.model, trace, asked.threads, windows, seconds)
    return {
        "drawing over stopped": measure.summary(ratios),
        "worst_window": round(min(ratios), 3),
        "target": TARGET,
        "met": statistics.median(ratios) >= TARGET,
        **meter.figures(),
    }
