"""Tokens into rows of a fixed width: incremental, broken after blanks, nothing lost.

Only the last row ever changes, so a token costs the same at the start and after thousands. A row is
a list of fragments `(text, token, width)`; a blank that no longer fits hangs over the edge with no
width, and a line feed is a fragment of no width that ends its row.
"""

from __future__ import annotations

from bisect import bisect_right

from moescope.ui.text import cells, clusters, plain

Fragment = tuple[str, int, int]  # text, token, width in cells
LINE_FEED = "\n"


class Rows:
    """The rows of a growing text at one width."""

    def __init__(self, width: int) -> None:
        self.width = max(1, width)
        self.rows: list[list[Fragment]] = [[]]
        self.tokens = 0
        self._first: list[int] = [0]  # the token each row starts with
        self._used = 0  # cells taken in the last row
        self._break: tuple[int, int] | None = (
            None  # where the last row may be cut: fragment, offset
        )

    def append(self, text: str) -> None:
        """Add the next token."""
        token = self.tokens
        self.tokens += 1
        parts = text.split(LINE_FEED)
        for number, part in enumerate(parts):
            if number:
                self.rows[-1].append((LINE_FEED, token, 0))
                self._open_row(token if part or number < len(parts) - 1 else token + 1)
            if part:
                self._add(plain(part), token)
        if not text:
            self.rows[-1].append(("", token, 0))

    def rows_of(self, token: int) -> range:
        """The rows that hold a part of `token`."""
        last = max(0, bisect_right(self._first, token) - 1)
        first = last
        while first > 0 and self._first[first] == token:
            first -= 1
        while first < last and all(fragment[1] != token for fragment in self.rows[first]):
            first += 1
        return range(first, last + 1)

    def token_at(self, row: int, x: int) -> int | None:
        """The token under a cell; beyond the end of a row, the last one of the row."""
        if not 0 <= row < len(self.rows) or not self.rows[row]:
            return None
        right = 0
        for _, token, width in self.rows[row]:
            right += width
            if x < right:
                return token
        return self.rows[row][-1][1]

    def _add(self, text: str, token: int) -> None:
        width = cells(text)
        if self._used + width <= self.width:
            self._put(text, token, width)
            return
        piece, size = "", 0  # what of the text goes into this row as one fragment
        for char, char_width in clusters(text):
            if self._used + size + char_width <= self.width:
                piece += char
                size += char_width
                continue
            if piece:
                self._put(piece, token, size)
                piece, size = "", 0
            if char == " ":
                self._put(" ", token, 0)
                continue
            if self.rows[-1]:
                self._next_row(token)
            if self._used + char_width > self.width and self.rows[-1]:
                self._break = None
                self._next_row(token)
            piece, size = char, char_width
        if piece:
            self._put(piece, token, size)

    def _put(self, text: str, token: int, width: int) -> None:
        row = self.rows[-1]
        row.append((text, token, width))
        self._used += width
        blank = text.rfind(" ")
        if blank >= 0:
            self._break = (len(row) - 1, blank + 1)

    def _next_row(self, token: int) -> None:
        """Open a row with what stands after the last blank, if there is one in this row."""
        row, cut = self.rows[-1], self._break
        if cut is None:
            self._open_row(token)
            return
        index, offset = cut
        text, owner, width = row[index]
        head, rest = text[:offset], text[offset:]
        tail = row[index + 1 :]
        if rest:
            left = min(width, cells(head))
            row[index] = (head, owner, left)
            tail = [(rest, owner, width - left), *tail]
        del row[index + 1 :]
        self._open_row(tail[0][1] if tail else token)
        self.rows[-1].extend(tail)
        self._used = sum(fragment[2] for fragment in tail)

    def _open_row(self, token: int) -> None:
        self.rows.append([])
        self._first.append(token)
        self._used = 0
        self._break = None
