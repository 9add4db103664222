"""The first frame: who we are and what is being opened, drawn before anything slow is imported.

It looks like the main screen while loading, which takes its place; numpy, the widgets and the
engine come after it.
"""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Static


class OpeningScreen(Screen[None]):
    """`name` is printable."""

    AUTO_FOCUS = ""
    DEFAULT_CSS = """
    OpeningScreen #status { height: 1; padding: 0 1; }
    OpeningScreen #panel { height: 1fr; border: round $foreground 30%; border-title-color: $text; }
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.opened = name

    def compose(self) -> ComposeResult:
        yield Static(Text(self.opened, style="bold", no_wrap=True), id="status")
        panel = Static(Text("starting moescope", style="bold"), id="panel")
        panel.border_title = "loading"
        yield panel
