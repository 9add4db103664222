"""What the screen costs on the model of the decode benchmark: `screen_cost.py` on other weights."""

from __future__ import annotations

import signal
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    limit = int(60 + 4 * windows * seconds)
    with tempfile.TemporaryDirectory() as name, measure.Meter() as meter, _within(limit):
        trace = Path(name) / "watched.moetrace"
        ratios = screen_cost.measure(asked.model, trace, asked.threads, windows, seconds)
    return {
        "drawing over stopped": measure.summary(ratios),
        "worst_window": round(min(ratios), 3),
        "target": TARGET,
        "met": statistics.median(ratios) >= TARGET,
        **meter.figures(),
    }


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """TimeoutError after `seconds`: an engine that died draws no frame that could be waited for."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
