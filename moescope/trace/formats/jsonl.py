"""The long form as JSON lines: a first line `{"moescope_meta": …}`, then one object a row.

JSON has no NaN: a number that is none is null, an infinity `"inf"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moescope.safety import LIMITS
from moescope.trace.formats import assemble, longform
from moescope.trace.formats.longform import COLUMNS, Row
from moescope.trace.formats.source import Source
from moescope.trace.formats.text import json_list, json_number, lines, real
from moescope.trace.metadata import trace_error

MARK = "moescope_meta"


def detect(start: bytes) -> bool:
    """An object in the first line: our header, or a row with the required columns."""
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    if first.startswith(b'{"moescope_meta"'):
        return True
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and set(longform.REQUIRED) <= set(row)


def write(path: Path, source: Source) -> int:
    """Write all frames; the number of rows."""
    names = longform.columns_of(source.meta)
    count = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(json.dumps({MARK: longform.header_of(source)}) + "\n")
        for row in longform.rows_of(source):
            cells = (f'"{name}":{_cell(COLUMNS[name], row[name])}' for name in names)
            file.write(f"{{{','.join(cells)}}}\n")
            count += 1
    return count


def _cell(kind: str, value: Any) -> str:
    if value is None:
        return "null"
    if kind == "text":
        return json.dumps(value)
    if kind == "real":
        return json_number(value)
    return str(value) if kind == "whole" else json_list(value)


def read(path: Path) -> Source:
    """A trace from JSON lines, ours or objects with at least the required columns."""
    header = None
    for at, line in lines(path):
        first = _object(line, path, at)
        header = first.get(MARK)
        break
    return assemble.source_of(header, lambda: _rows(path), path)


def _rows(path: Path) -> Iterator[Row]:
    count = 0
    for at, line in lines(path):
        if not line.strip():
            continue
        parsed = _object(line, path, at)
        if at == 1 and MARK in parsed:
            continue
        count += 1
        if count > LIMITS.import_rows:
            raise trace_error(path, f"line {at}: more than {LIMITS.import_rows:,} rows")
        row = {name: _value(COLUMNS[name], v) for name, v in parsed.items() if name in COLUMNS}
        yield assemble.check_row(row, path, f"line {at}")


def _object(line: str, path: Path, at: int) -> dict[str, Any]:
    try:
        parsed = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise trace_error(path, f"line {at}: expected one JSON object") from error
    if not isinstance(parsed, dict) or len(parsed) > LIMITS.import_columns:
        raise trace_error(path, f"line {at}: expected one JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("the same key twice")
    return made


def _value(kind: str, value: Any) -> Any:
    if kind == "real":
        return real(value)
    if kind == "reals" and type(value) is list:
        return [real(v) for v in value]
    return value
