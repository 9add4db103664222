"""Widgets on a screen of their own: mounted at a size, shown data, read back as text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from textual.app import App, ComposeResult
from textual.events import Event
from textual.geometry import Region
from textual.message import Message
from textual.pilot import Pilot
from textual.widget import Widget

from moescope.ui.panels import MapData, TokenCell, TranscriptData


class Stage(App[None]):
    """One widget, alone, at the colours that were asked for."""

    CSS = "Screen > * { border: none; height: 1fr; }"

    def __init__(self, widget: Widget, colours: str = "truecolor") -> None:
        super().__init__()
        self.widget = widget
        self.colour_depth = colours
        self.heard: list[Any] = []  # messages that widgets posted

    def compose(self) -> ComposeResult:
        yield self.widget

    async def _on_message(self, message: Message) -> None:
        if not isinstance(message, Event):
            self.heard.append(message)
        await super()._on_message(message)


@asynccontextmanager
async def staged(
    widget: Any, data: Any, size: tuple[int, int], *, colours: str = "truecolor", theme: str = ""
) -> AsyncIterator[Pilot[None]]:
    """`widget` showing `data` on a screen of `size`, without a border."""
    app = Stage(widget, colours)
    async with app.run_test(size=size) as pilot:
        if theme:
            app.theme = theme
        await pilot.pause()
        widget.show(data)
        await pilot.pause()
        yield pilot


def lines(widget: Widget) -> list[str]:
    """What the widget draws, as text."""
    return [widget.render_line(y).text for y in range(widget.size.height)]


def watch_refresh(widget: Any) -> list[set[int]]:
    """Rows refreshed from now on, one set a call; an empty set stands for the whole widget."""
    seen: list[set[int]] = []
    plain = widget.refresh

    def refresh(*regions: Region, **how: Any) -> Any:
        seen.append({y for region in regions for y in region.line_range})
        return plain(*regions, **how)

    widget.refresh = refresh
    return seen


def map_data(
    routers: int,
    experts: int,
    top_k: int,
    *,
    cursor: tuple[int, int] = (0, 0),
    wrong: Iterable[int] = (),
    seed: int = 1,
    **fields: Any,
) -> MapData:
    """A token's picks over a random load."""
    random = np.random.default_rng(seed)
    levels = random.integers(0, 8, (routers, experts)).astype(np.uint8)
    marks = np.zeros((routers, experts), np.uint8)
    for row in marks:
        row[random.choice(experts, top_k, replace=False)] = 1
    given = {
        "levels": levels,
        "marks": marks,
        "num_experts": np.full(routers, experts, np.int16),
        "gutter": tuple(f"{router:02d}" for router in range(routers)),
        "score_sum": np.linspace(0.3, 0.9, routers, dtype=np.float32),
        "sum_wrong": np.isin(np.arange(routers), list(wrong)),
        "cursor": cursor,
    }
    return MapData(**(given | fields))


def transcript(texts: Iterable[str], **fields: Any) -> TranscriptData:
    cells = tuple(TokenCell(text, index % 8, index) for index, text in enumerate(texts))
    given: dict[str, Any] = {"cells": cells, "cursor": None, "follow": True, "epoch": 0}
    return TranscriptData(**(given | {"title": "tokens"} | fields))
