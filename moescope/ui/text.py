"""Text in terminal cells: fitting, wrapping, numbers of a fixed width, and the last line filter.

`ControlFilter` stands behind every widget and every message of the app: whatever reached a segment,
no control byte leaves for the terminal. The rule per character is `safety.escape_char`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from unicodedata import combining

from rich.cells import cell_len, get_character_cell_size
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from moescope.safety import escape_char

CUT = "…"
NEWLINE = "⏎"
FIRST_HIDDEN = "\U000e0100"  # variation selectors that can carry text, and above


class ControlFilter(LineFilter):
    """Escapes what `safety.escape_char` escapes, in every segment; line feeds become `⏎`.

    An escape is wider than the character was, so a line that held one is cut back to its width.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        if is_plain("".join([segment.text for segment in segments])):
            return segments
        width = sum(segment.cell_length for segment in segments)
        shown = [
            segment if segment.control else Segment(plain(segment.text), segment.style)
            for segment in segments
        ]
        if sum(segment.cell_length for segment in shown) == width:
            return shown
        return Segment.adjust_line_length(shown, width)


class InTurn(LineFilter):
    """Several filters as one; `in_turn` makes them."""

    def __init__(self, filters: tuple[LineFilter, ...]) -> None:
        super().__init__()
        self.filters = filters

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        for each in self.filters:
            segments = each.apply(segments, background)
        return segments


@lru_cache(maxsize=16)
def in_turn(filters: tuple[LineFilter, ...]) -> InTurn:
    """The same object for the same filters: a line keeps what a filter made of it, so one that
    stays is filtered once."""
    return InTurn(filters)


def is_plain(text: str) -> bool:
    """Whether nothing in one line of text needs escaping; may say no where nothing does."""
    return text.isprintable() and (text.isascii() or max(text) < FIRST_HIDDEN)


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """`text` as one line without anything a terminal acts on."""
    if is_plain(text):
        return text
    return "".join(NEWLINE if char == "\n" else escape_char(char) for char in text)


def cells(text: str) -> int:
    """Width in terminal cells."""
    return len(text) if text.isascii() and text.isprintable() else cell_len(text)


def cut(text: str, width: int) -> str:
    """`text` as one line of at most `width` cells, ended by `…` where something is missing."""
    text = plain(text)
    if cells(text) <= width:
        return text
    if width <= 0:
        return ""
    kept, used = [], 0
    for char in text:
        used += get_character_cell_size(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + CUT


def fit(text: str, width: int, align: str = "<") -> str:
    """`text` cut or padded to exactly `width` cells; `align` is `<`, `>` or `^`."""
    text = cut(text, width)
    room = max(0, width - cells(text))
    if align == ">":
        return " " * room + text
    if align == "^":
        return " " * (room // 2) + text + " " * (room - room // 2)
    return text + " " * room


def clusters(text: str) -> Iterator[tuple[str, int]]:
    """Pieces that are never split, with their width: a character and what combines with it."""
    piece, width = "", 0
    for char in text:
        size = get_character_cell_size(char)
        if piece and (size == 0 or combining(char)):
            piece += char
            continue
        if piece:
            yield piece, width
        piece, width = char, size
    if piece:
        yield piece, width


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken after blanks where there are any.

    Nothing is dropped: the lines joined are the text, but for its line feeds.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line, used, blank_at, blank_used = "", 0, 0, 0
        for piece, size in clusters(paragraph):
            while used + size > width and line:
                if blank_at and piece != " ":
                    lines.append(line[:blank_at])
                    line, used = line[blank_at:], used - blank_used
                else:
                    lines.append(line)
                    line, used = "", 0
                blank_at = blank_used = 0
            line += piece
            used += size
            if piece == " ":
                blank_at, blank_used = len(line), used
        lines.append(line)
    return lines


def gap(margin: float | None) -> str:
    """A margin: 0.000 is an exact tie, so what is only small reads `<.001`."""
    if margin is not None and 0 < margin < 0.0005:
        return "<.001"
    return number(margin)


def number(value: float | None, digits: int = 3, missing: str = "─") -> str:
    """A short figure: `digits` decimals below 10, fewer as it grows, `missing` where unknown."""
    if value is None or math.isnan(value):
        return missing
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size < 10:
        return f"{value:.{digits}f}"
    if size < 100:
        return f"{value:.{max(0, digits - 1)}f}"
    if size < 10_000:
        return f"{value:.{max(0, digits - 2)}f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
