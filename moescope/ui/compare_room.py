"""Which panels of the compare screen stand where, by the room there is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

NARROW, WIDE = 104, 150  # columns from which two, and three panels stand beside each other
LOW = 30  # rows below which texts and one panel are all there is
PLOT_FROM = 36  # rows of a terminal that has room for the plot
BETWEEN_ROWS = 16
TEXT_ROWS = 8  # of the texts where there is little room
# by the room there is: what `d` goes through, and what stands there always
VIEWS = {
    "column": (("agreement", "layers", "xor", "left", "right"), ()),
    "two": (("xor", "layers", "left", "right"), ("agreement",)),
    "wide": (("xor", "left", "right"), ("layers", "agreement")),
}
PANELS = {"xor": "map", "left": "map", "right": "map"}  # view -> the panel that shows it
ALL = ("map", "layers", "agreement", "gate")


@dataclass(frozen=True, slots=True)
class Room:
    """`kind` is `column`, `two` or `wide`; `views` are what one place shows in turn."""

    kind: str
    views: tuple[str, ...]
    always: tuple[str, ...]
    plot: bool  # whether the plot has room
    between: int  # rows of the panels below the texts, where those are not all there is

    @property
    def column(self) -> bool:
        return self.kind == "column"

    def panels(self, view: str) -> set[str]:
        """The panels that stand there while the turn is at `view`."""
        return {PANELS.get(view, view), *self.always}


def room_for(width: int, height: int, routers: int, gates: bool) -> Room:
    """The room of a terminal. `gates`: whether the two lanes have gates of their own."""
    little = width < NARROW or height < LOW
    kind = "column" if little else "wide" if width >= WIDE else "two"
    views, always = VIEWS[kind]
    between = min(max(BETWEEN_ROWS, routers + 3), (height - 3) // 2)
    plot = height >= PLOT_FROM and kind != "column"
    return Room(kind, (*views, "gate") if gates else views, always, plot, between)
