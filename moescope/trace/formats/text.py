"""Numbers, texts and lines for CSV and JSONL: exact, bounded, and safe in a spreadsheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moescope.safety import LIMITS, escape_char
from moescope.trace.metadata import trace_error

HEADER_BYTES = 64 << 20  # of the first line: the meta, with the learned vectors of routers
# What a spreadsheet takes for a formula, also behind spaces, also in full width; and our own mark,
# so that taking it away again is exact.
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠']")
ESCAPE = re.compile(r"\\(\\|n|t|u[0-9a-f]{4}|U[0-9a-f]{8})")
SHORT = {"\n": "\\n", "\t": "\\t", "\\": "\\\\"}


def guarded(text: str) -> str:
    """Text on one line that neither a terminal nor a spreadsheet acts on.

    Backslashes, line ends and everything that `safety` would not print become escapes (`\\n`,
    `\\u001b`); a `'` goes before what could begin a formula.
    """
    if not text.isascii() or not text.isprintable() or "\\" in text:
        text = "".join(map(_escaped, text))
    return f"'{text}" if FORMULA.match(text) else text


def _escaped(char: str) -> str:
    if char in SHORT:
        return SHORT[char]
    if escape_char(char) == char:
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def unguarded(text: str) -> str:
    """What `guarded` was given."""
    if text.startswith("'") and FORMULA.match(text[1:]):
        text = text[1:]
    return ESCAPE.sub(_meant, text) if "\\" in text else text


def _meant(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "uU":
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else match[0]
    return {"n": "\n", "t": "\t", "\\": "\\"}[code]


def number(value: float) -> str:
    """A float32 in the fewest digits that always give it back (9); -0.0 stays negative."""
    text = f"{value:.9g}"
    return "-0.0" if text == "-0" else text


def json_number(value: float) -> str:
    """A float32 for JSON, which has no NaN and no infinity: null, and the words in quotes."""
    if math.isfinite(value):
        return number(value)
    return "null" if math.isnan(value) else f'"{number(value)}"'


def json_list(values: Any) -> str:
    """A row of numbers as a JSON list."""
    items = values.tolist()
    if values.dtype.kind == "i":
        return f"[{','.join(map(str, items))}]"
    return f"[{','.join(map(json_number, items))}]"


def real(value: Any) -> Any:
    """A number from JSON as a float: null is NaN, `"inf"` infinity; the rest is for the check."""
    if value is None:
        return math.nan
    if value in ("inf", "-inf"):
        return float(value)
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def lines(path: Path, first_limit: int = HEADER_BYTES) -> Iterator[tuple[int, str]]:
    """Line numbers and lines, never more than a limit of bytes at once.

    Raises `MoescopeError` (TRACE) for a line that is longer, or holds bytes that are not UTF-8.
    """
    try:
        with path.open("rb") as file:
            limit, at = first_limit, 0
            while raw := file.readline(limit + 1):
                at += 1
                if at == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if at > 1 or not raw.startswith((b"#", b"{")):
                    limit = LIMITS.import_line
                if len(raw) > limit:
                    raise trace_error(path, f"line {at}: longer than {limit:,} bytes")
                limit = LIMITS.import_line
                if b"\x00" in raw:
                    raise trace_error(path, f"line {at}: expected text, found a NUL byte")
                try:
                    yield at, raw.decode()
                except UnicodeDecodeError as error:
                    raise trace_error(path, f"line {at}: expected UTF-8") from error
    except OSError as error:
        raise trace_error(path, (error.strerror or "cannot be read").lower()) from error
