"""The long form as CSV. The header travels in a first line that begins with `#`.

Read it with `pandas.read_csv(path, comment="#")`, DuckDB's `comment = '#'` or polars'
`comment_prefix="#"`: every field is quoted, so that a `#` in a token is none. Lists are JSON. In
texts, control characters and backslashes are escapes, and a `'` stands before what a spreadsheet
would run as a formula; Parquet and JSONL hold texts bare.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moescope.safety import LIMITS, single_line
from moescope.trace.formats import assemble, longform
from moescope.trace.formats.longform import COLUMNS, REQUIRED, Row
from moescope.trace.formats.source import Source
from moescope.trace.formats.text import guarded, json_list, lines, number, real, unguarded
from moescope.trace.metadata import trace_error

MARK = "# moescope_meta "


def detect(start: bytes) -> bool:
    """A first line with our mark, or one that names the columns we need."""
    if start.startswith(MARK.encode()):
        return True
    first = start.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace")
    names = {name.strip().strip('"') for name in first.split(",")}
    return set(REQUIRED) <= names


def write(path: Path, source: Source) -> int:
    """Write all frames; the number of rows."""
    names = longform.columns_of(source.meta)
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"{MARK}{json.dumps(longform.header_of(source))}\n")
        table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        table.writerow(names)
        for row in longform.rows_of(source):
            table.writerow([_cell(COLUMNS[name], row[name]) for name in names])
            count += 1
    return count


def _cell(kind: str, value: Any) -> str:
    if value is None:
        return ""
    if kind == "text":
        return guarded(value)
    if kind == "real":
        return number(value)
    return str(value) if kind == "whole" else json_list(value)


def read(path: Path) -> Source:
    """A trace from a CSV file, ours or one with at least the required columns."""
    header = None
    for _, line in lines(path):
        if line.startswith(MARK):
            try:
                header = json.loads(line[len(MARK) :])
            except (ValueError, RecursionError) as error:
                raise trace_error(path, "line 1: expected JSON after the mark") from error
        break
    ours = header is not None
    return assemble.source_of(header, lambda: _rows(path, ours), path)


def _rows(path: Path, ours: bool) -> Iterator[Row]:
    at = 0
    names: list[str] | None = None

    def texts() -> Iterator[str]:
        nonlocal at
        for number_, line in lines(path):
            at = number_
            if names is not None or not line.startswith("#"):
                yield line

    limit = csv.field_size_limit(LIMITS.import_line)
    table = csv.reader(texts())
    try:
        names = next(table, None)
        if names is None or not set(REQUIRED) <= set(names):
            raise trace_error(path, f"line {at}: expected columns {', '.join(REQUIRED)}")
        if len(names) > LIMITS.import_columns or len(set(names)) != len(names):
            raise trace_error(path, f"line {at}: expected at most 256 columns, each once")
        known = [(i, name, COLUMNS[name]) for i, name in enumerate(names) if name in COLUMNS]
        for count, cells in enumerate(table):
            if not cells:
                continue
            if len(cells) != len(names):
                raise trace_error(
                    path, f"line {at}: expected {len(names)} columns, found {len(cells)}"
                )
            if count >= LIMITS.import_rows:
                raise trace_error(path, f"line {at}: more than {LIMITS.import_rows:,} rows")
            row = {n: _value(n, kind, cells[i], ours, path, at) for i, n, kind in known}
            yield assemble.check_row(row, path, f"line {at}")
    except csv.Error as error:
        raise trace_error(path, f"line {at}: {single_line(str(error), 120)}") from error
    finally:
        csv.field_size_limit(limit)


def _value(name: str, kind: str, cell: str, ours: bool, path: Path, at: int) -> Any:
    if kind == "text":
        return unguarded(cell) if ours else cell
    if cell == "":
        return None
    try:
        if kind == "whole":
            return int(cell) if len(cell) < 24 else cell
        if kind == "real":
            return float(cell)
        values = json.loads(cell)
        return [real(v) for v in values] if kind == "reals" and type(values) is list else values
    except (ValueError, RecursionError) as error:
        found = single_line(repr(cell), 60)
        raise trace_error(path, f"line {at}: {name}: expected a number, found {found}") from error
