"""A lane's text, tinted token by token; every cell knows its token."""

from __future__ import annotations

from collections.abc import Sequence

from textual.message import Message

from moescope.ui.panels import TranscriptData
from moescope.ui.widgets.panel import Panel, Row


class Transcript(Panel[TranscriptData]):
    """Prompt and generated text; the last row stays in view while following."""

    class Picked(Message):
        """A token was clicked: its index into `cells`."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    class Scrolled(Message):
        """The reader scrolled; `at_end` says whether the last row is in view."""

        def __init__(self, at_end: bool) -> None:
            super().__init__()
            self.at_end = at_end

    def labels(self, data: TranscriptData) -> tuple[str, str]:
        return data.title, data.subtitle

    def draw(self, data: TranscriptData, width: int, height: int) -> Sequence[Row]:
        return ()

    def scroll_rows(self, rows: int) -> None:
        """Move the view by `rows` (negative: back)."""

    def page(self, direction: int) -> None:
        """Move the view by one page forwards (1) or back (-1)."""
