"""The long form as Parquet (zstd); pyarrow is imported only here.

The header travels in the schema's metadata under `moescope_meta`. A stranger's file is judged by
its metadata before a page is read: rows, columns, their types, and how many values they declare.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, single_line
from moescope.trace.formats import assemble, longform
from moescope.trace.formats.longform import COLUMNS, REQUIRED, Row
from moescope.trace.formats.source import Source
from moescope.trace.metadata import trace_error

MARK = b"moescope_meta"
BLOCK_ROWS = 16_384  # written at once
BATCH_ROWS = 1024  # read at once
MAGIC = b"PAR1"


def detect(start: bytes) -> bool:
    return start.startswith(MAGIC)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MoescopeError(
            "Parquet needs pyarrow, which is not installed",
            hint="pip install pyarrow, or convert to .csv or .jsonl",
            code=ExitCode.USAGE,
        ) from error
    return pyarrow, pyarrow.parquet


def write(path: Path, source: Source) -> int:
    """Write all frames; the number of rows."""
    pa, pq = _pyarrow()
    types = {
        "whole": pa.int32(),
        "text": pa.string(),
        "real": pa.float32(),
        "wholes": pa.list_(pa.int16()),
        "reals": pa.list_(pa.float32()),
    }
    names = longform.columns_of(source.meta)
    header = json.dumps(longform.header_of(source)).encode()
    schema = pa.schema([(name, types[COLUMNS[name]]) for name in names], metadata={MARK: header})
    count = 0
    rows = longform.rows_of(source)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while block := list(itertools.islice(rows, BLOCK_ROWS)):
            arrays = [
                pa.array([_plain(row[name]) for row in block], type=types[COLUMNS[name]])
                for name in names
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            count += len(block)
    return count


def _plain(value: Any) -> Any:
    # UTF-8 has no lone surrogates; a text that holds one shows it as an escape.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def read(path: Path) -> Source:
    """A trace from a Parquet file, ours or one with at least the required columns."""
    pa, pq = _pyarrow()
    file = _open(pa, pq, path, [])
    names = _check(pa, file, path)
    header = (file.schema_arrow.metadata or {}).get(MARK)
    try:
        parsed = None if header is None else json.loads(header)
    except (ValueError, RecursionError) as error:
        raise trace_error(path, "moescope_meta: expected JSON") from error
    return assemble.source_of(parsed, lambda: _rows(pa, pq, path, names), path)


def _open(pa: Any, pq: Any, path: Path, names: list[str]) -> Any:
    # Texts stay in their dictionaries: two kilobytes can stand for a gigabyte of repeated text.
    texts = [name for name in names if COLUMNS[name] == "text"]
    try:
        return pq.ParquetFile(path, read_dictionary=texts, memory_map=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise trace_error(path, f"not a good Parquet file: {_short(error)}") from error


def _check(pa: Any, file: Any, path: Path) -> list[str]:
    """Refuse from the metadata what would expand too far; the columns to read."""
    meta, schema = file.metadata, file.schema_arrow
    if meta.num_rows > LIMITS.import_rows:
        raise trace_error(path, f"declares {meta.num_rows:,} rows; limit {LIMITS.import_rows:,}")
    if meta.num_columns > LIMITS.import_columns:
        raise trace_error(path, f"{meta.num_columns:,} columns; limit {LIMITS.import_columns}")
    names = [name for name in schema.names if name in COLUMNS]
    for name in REQUIRED:
        if names.count(name) != 1:
            raise trace_error(path, f"{name}: expected one column of this name")
    for name in names:
        if not _fits(pa, COLUMNS[name], schema.field(name).type):
            found = single_line(str(schema.field(name).type), 60)
            raise trace_error(path, f"{name}: expected {COLUMNS[name]}, found {found}")
    for group in range(meta.num_row_groups):
        rows = meta.row_group(group)
        for i in range(rows.num_columns):
            column = rows.column(i)
            name = column.path_in_schema.split(".")[0]
            most = max(rows.num_rows, 1) * assemble.LONGEST.get(name, 1)
            if name in names and not 0 <= column.num_values <= most:
                raise trace_error(
                    path, f"{name}: declares {column.num_values:,} values; limit {most:,}"
                )
            if name in names and column.total_uncompressed_size > LIMITS.import_bytes:
                raise trace_error(path, f"{name}: expands beyond {LIMITS.import_bytes:,} bytes")
    return names


def _fits(pa: Any, kind: str, found: Any) -> bool:
    types = pa.types
    if kind in ("wholes", "reals"):
        if not (types.is_list(found) or types.is_large_list(found)):
            return False
        return _fits(pa, kind[:-1], found.value_type)
    if kind == "whole":
        return bool(types.is_integer(found))
    if kind == "real":
        return bool(types.is_floating(found) or types.is_integer(found))
    if types.is_dictionary(found):
        found = found.value_type
    return bool(types.is_string(found) or types.is_large_string(found))


def _rows(pa: Any, pq: Any, path: Path, names: list[str]) -> Iterator[Row]:
    at = 0
    try:
        batches = _open(pa, pq, path, names).iter_batches(
            BATCH_ROWS, columns=names, use_threads=False
        )
        for batch in batches:
            columns = {name: batch.column(batch.schema.get_field_index(name)) for name in names}
            values = {name: _values(COLUMNS[name], column) for name, column in columns.items()}
            for i in range(batch.num_rows):
                at += 1
                row = {name: column[i] for name, column in values.items()}
                yield assemble.check_row(row, path, f"row {at}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise trace_error(path, f"row {at}: {_short(error)}") from error


def _values(kind: str, column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if kind == "wholes":
        return [None if v is None else [-1 if x is None else x for x in v] for v in values]
    if kind == "reals":
        nan = float("nan")
        return [None if v is None else [nan if x is None else x for x in v] for v in values]
    return values


def _short(error: BaseException) -> str:
    return single_line(str(error).splitlines()[0] if str(error) else type(error).__name__, 160)
