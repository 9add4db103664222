"""The last line: keys that do something now. Which those are, the screen decides."""

from __future__ import annotations

from textual.screen import Screen
from textual.widgets import Footer

Offer = tuple[object, ...]


class KeyLine(Footer):
    """Textual's footer, built again only where it would read otherwise: each time costs a dozen
    widgets, and every one of them leaves a watcher behind."""

    _asked: Offer | None = None  # what it was last built for

    def bindings_changed(self, screen: Screen[object]) -> None:
        seen = self.is_attached and screen is self.screen and screen.app.app_focus
        offer = self._offer(screen) if seen else None
        if offer is not None and offer == self._asked:
            return
        self._asked = offer or self._asked
        super().bindings_changed(screen)

    def watch_show_command_palette(self) -> None:
        if self.is_attached:
            self.bindings_changed(self.screen)

    def _offer(self, screen: Screen[object]) -> Offer:
        shown = (
            (active.binding.key, active.binding.description, active.enabled)
            for active in screen.active_bindings.values()
            if active.binding.show
        )
        return (self.show_command_palette, *shown)
