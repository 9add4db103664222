"""Ids to text as they come: never half a character, and joined exactly what a full decode gives.

Where every id stands for bytes, they are decoded as they come (`ByteStream`). Else decoding is no
sum over ids: a character may take several, a leading space is dropped at the beginning only, and
one bad byte spoils a run. Then a window is decoded whose first part was given out before, and the
rest of its text is new (`WindowStream`).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

HOLD = 32  # ids: a longer run of bytes is given out as it stands
MARK = "\N{REPLACEMENT CHARACTER}"


class ByteStream:
    """A sequence of a byte-level vocabulary. Bytes that are no UTF-8 become marks."""

    __slots__ = ("_bytes_of", "_decoder")

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """What is held back, at the end of the sequence."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Any other sequence. `push` an id, get the text that is now certain."""

    __slots__ = ("_decode", "_given", "_ids", "_is_byte", "_is_silent", "_open")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_byte: Callable[[int], bool],
        is_silent: Callable[[int], bool],
    ) -> None:
        """`is_byte`: ids that stand for one byte and are judged as a run; `is_silent`: ids that
        decoding leaves out."""
        self._decode, self._is_byte, self._is_silent = decode, is_byte, is_silent
        self._ids: list[int] = []  # the window
        self._given = 0  # how many of its ids are given out
        self._open = False  # whether it ends in a run of bytes

    def push(self, token_id: int) -> str:
        """Text that became certain with this id; often one word, sometimes empty."""
        self._ids.append(token_id)
        if self._is_silent(token_id):
            return ""
        self._open = self._is_byte(token_id)
        held = len(self._ids) - self._given
        if not self._open:
            text = self._new(len(self._ids))
            if text and not text.endswith(MARK):
                return self._give(text, len(self._ids))
        if held < HOLD:
            return ""
        for end in range(len(self._ids), len(self._ids) - 4, -1):
            if not (text := self._new(end)).endswith(MARK):
                return self._give(text, end)
        return self._give(self._new(len(self._ids)), len(self._ids))

    def flush(self) -> str:
        """What is held back, at the end of the sequence."""
        return self._give(self._new(len(self._ids)), len(self._ids))

    def _new(self, end: int) -> str:
        """The text of the window's ids up to `end` that was not given out yet."""
        before = self._decode(self._ids[: self._given]) if self._given else ""
        whole = self._decode(self._ids[:end])
        if whole.startswith(before):
            return whole[len(before) :]
        pairs = enumerate(zip(before, whole, strict=False))
        return whole[next((i for i, (old, new) in pairs if old != new), len(whole)) :]

    def _give(self, text: str, end: int) -> str:
        """Give `text` out; the window then begins at what was given last, where that has text of
        its own (else a leading space after it would be taken for the first)."""
        if self._given and self._decode(self._ids[self._given : end]):
            del self._ids[: self._given]
            end -= self._given
        self._given = end
        return text


Stream = ByteStream | WindowStream
