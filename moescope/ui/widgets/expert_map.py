"""The expert map: every router and every expert on one screen."""

from __future__ import annotations

from collections.abc import Sequence

from textual.message import Message

from moescope.ui.panels import MapData
from moescope.ui.widgets.panel import Panel, Row

ZOOMS = ("auto", "cell", "half", "braille")


class ExpertMap(Panel[MapData]):
    """Picks by shape, load by colour, the score sum at the right."""

    class Picked(Message):
        """A cell was clicked."""

        def __init__(self, router: int, expert: int) -> None:
            super().__init__()
            self.router = router
            self.expert = expert

    class Hovered(Message):
        """The mouse is over this cell; None when it left the cells."""

        def __init__(self, cell: tuple[int, int] | None) -> None:
            super().__init__()
            self.cell = cell

    _zoom = "auto"

    @property
    def zoom(self) -> str:
        """`auto` takes the largest that fits; else `cell`, `half` or `braille`."""
        return self._zoom

    @zoom.setter
    def zoom(self, value: str) -> None:
        if value not in ZOOMS:
            raise ValueError(f"zoom: expected one of {', '.join(ZOOMS)}, found {value}")
        self._zoom = value

    @property
    def zoom_shown(self) -> str:
        """The zoom that is drawn now, also under `auto`."""
        return "cell"

    def labels(self, data: MapData) -> tuple[str, str]:
        return data.title, f"{data.gutter[data.cursor[0]]} E{data.cursor[1]:03d}"

    def draw(self, data: MapData, width: int, height: int) -> Sequence[Row]:
        return ()
