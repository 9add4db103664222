"""The chunks of an open trace: fetched when needed, checked, and the newest ones kept.

A chunk that is damaged gets a `fault`, once, and is left out from then on. Which chunks there are
is found by `reader.py`; what columns mean is in `chunk.py`, what is asked of them in `checks.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MoescopeError
from moescope.safety import single_line
from moescope.trace import checks
from moescope.trace.chunk import ChunkStrings, frames_of
from moescope.trace.columns import COLUMN_BYTES, ColumnError, checksum, unpack
from moescope.trace.fields import ARRAYS, FLAGS, SCALARS, SHADOW, SHADOW_FIELDS, Columns
from moescope.trace.frames import Frame

CHUNK_BYTES = 4 * COLUMN_BYTES  # one chunk, expanded
STRINGS_BYTES = 4 << 20  # the texts of 256 tokens
CACHE_BYTES = 96 << 20  # of expanded chunks
BASE = ("flags", "shape", "strings", "variant", *(name for name, _ in SCALARS))
ALTERNATIVES = ("alternatives", "alternatives.ids", "alternatives.logprobs")
FIELD_NAMES = tuple(name for name, *_ in ARRAYS)
REQUIRED = frozenset(BASE) | {name for name in FIELD_NAMES if name not in FLAGS}
SHADOW_SUFFIXES = ("", *(f".{name}" for name in SHADOW_FIELDS))

Rows = list[tuple[Any, ...]]


@dataclass(slots=True, eq=False)
class Chunk:
    """`count` frames from `first` on, as far as they were read."""

    first: int
    count: int
    fault: str = ""
    columns: Columns = field(default_factory=dict)  # all that exist, once `strings` is there
    strings: ChunkStrings | None = None

    @property
    def end(self) -> int:
        return self.first + self.count

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


class Chunks:
    """Chunks in the order of their frames. `select` runs a query and may raise `MoescopeError`."""

    def __init__(
        self,
        select: Callable[[str, tuple[Any, ...]], Rows],
        problems: list[str],
        classes: dict[int, NDArray[Any]],
        absent: tuple[str, ...],
        foreign: bool,
        lacks_logits: Callable[[Chunk], bool],
    ) -> None:
        self._select, self._problems = select, problems
        self._classes, self._absent, self._foreign = classes, absent, foreign
        self._lacks_logits = lacks_logits
        self._all: list[Chunk] = []
        self._firsts: list[int] = []
        self._kept: OrderedDict[int, Chunk] = OrderedDict()

    @property
    def end(self) -> int:
        """Frames in chunks."""
        return self._all[-1].end if self._all else 0

    def add(self, count: int, fault: str = "") -> None:
        """One more chunk, after the others."""
        chunk = Chunk(self.end, count)
        self._all.append(chunk)
        self._firsts.append(chunk.first)
        if fault:
            self._skip(chunk, fault)

    def frames(self, at: int, stop: int) -> tuple[list[Frame], int]:
        """The readable frames from `at` to `stop` or the end of the chunk, and where they end."""
        chunk = self._at(at)
        end = min(chunk.end, stop)
        strings = self._load(chunk)
        if strings is None:
            return [], end
        return frames_of(chunk.columns, strings, at - chunk.first, end - chunk.first), end

    def column(self, name: str, at: int, stop: int) -> tuple[NDArray[Any] | None, int]:
        """One column from `at` to `stop` or the end of the chunk, None where it is not there."""
        chunk = self._at(at)
        end = min(chunk.end, stop)
        column = self._load_column(chunk, name)
        return (None if column is None else column[at - chunk.first : end - chunk.first]), end

    def verify(self) -> bool:
        """Check every column of every chunk. Returns whether any frame can be read."""
        return any([self._load(chunk) is not None for chunk in self._all])

    def check_columns(self, chunk: Chunk, columns: Columns) -> None:
        """Raise `ColumnError` for the first column that cannot be true."""
        shape = columns["shape"]
        if shape.shape != (chunk.count, 3):
            raise ColumnError("shape: expected one row a frame")

        def other(name: str) -> NDArray[Any]:
            if name not in columns:
                columns.update(self._fetch(chunk, (name,)))
                fault = checks.structure_fault(name, columns[name], chunk.count, shape)
                if fault is not None:
                    raise ColumnError(fault)
            return columns[name]

        for name, column in list(columns.items()):
            fault = checks.structure_fault(name, column, chunk.count, shape)
            if fault is None and self._foreign:
                fault = checks.value_fault(name, column, other, self._classes, self._absent)
            if fault is not None:
                raise ColumnError(fault)

    def _at(self, index: int) -> Chunk:
        return self._all[bisect_right(self._firsts, index) - 1]

    def _load_column(self, chunk: Chunk, name: str) -> NDArray[Any] | None:
        if chunk.fault:
            return None
        if chunk.strings is not None:
            return chunk.columns.get(name)
        try:
            columns = self._fetch(chunk, ("flags", "shape", name))
            self.check_columns(chunk, columns)
            return columns.get(name)
        except (ColumnError, MoescopeError) as error:
            self._skip(chunk, str(error))
            return None

    def _load(self, chunk: Chunk) -> ChunkStrings | None:
        """All columns of a chunk, checked and kept. None where it is damaged."""
        if chunk.fault:
            return None
        if chunk.strings is None:
            try:
                columns = self._fetch(chunk, (*BASE, *FIELD_NAMES, *ALTERNATIVES))
                strings = ChunkStrings(columns["strings"], chunk.count)
                shadows = shadow_columns(strings)
                columns |= self._fetch(chunk, shadows) if shadows else {}
                self.check_columns(chunk, columns)
                self._check_together(chunk, columns, strings)
            except (ColumnError, MoescopeError) as error:
                self._skip(chunk, str(error))
                return None
            for column in columns.values():
                column.flags.writeable = False
            chunk.columns, chunk.strings = columns, strings
        self._keep(chunk)
        return chunk.strings

    def _keep(self, chunk: Chunk) -> None:
        self._kept[chunk.first] = chunk
        self._kept.move_to_end(chunk.first)
        while len(self._kept) > 2 and sum(c.nbytes for c in self._kept.values()) > CACHE_BYTES:
            _, old = self._kept.popitem(last=False)
            old.columns, old.strings = {}, None

    def _fetch(self, chunk: Chunk, names: tuple[str, ...]) -> Columns:
        marks = ",".join("?" * len(names))
        query = f"SELECT name, n, crc, b FROM chunk WHERE first = ? AND name IN ({marks})"
        columns: Columns = {}
        left = COLUMN_BYTES
        for name, count, crc, blob in self._select(query, (chunk.first, *names)):
            if not isinstance(blob, bytes) or name not in names or count != chunk.count:
                raise ColumnError("holds another kind of value")
            if crc != checksum(name, chunk.first, count, blob):
                raise ColumnError("checksum differs")
            try:
                columns[name] = unpack(blob, STRINGS_BYTES if name == "strings" else left)
            except ColumnError as error:
                raise ColumnError(f"{name} {error}") from error
            left = min(left, CHUNK_BYTES - sum(column.nbytes for column in columns.values()))
        for name in REQUIRED.intersection(names) - set(columns):
            raise ColumnError(f"{name} is missing")
        return columns

    def _check_together(self, chunk: Chunk, columns: Columns, strings: ChunkStrings) -> None:
        flags = int(np.bitwise_or.reduce(columns["flags"]))
        if int(columns["variant"].max()) >= len(strings.variants):
            raise ColumnError("variant: expected one of the names in the chunk")
        for name in ("weights", "scores", "logits"):
            missing = flags & FLAGS[name] and name not in columns
            if missing and not (name == "logits" and self._lacks_logits(chunk)):
                raise ColumnError(f"{name} is missing")
        if any(name in columns for name in ALTERNATIVES):
            if not all(name in columns for name in ALTERNATIVES):
                raise ColumnError("alternatives are missing")
            widths = [columns[name].shape[1] for name in ALTERNATIVES[1:]]
            if int(columns["alternatives"].max()) > min(widths):
                raise ColumnError("alternatives: expected one list a frame")
        if flags & SHADOW and not set(shadow_columns(strings)) <= set(columns):
            raise ColumnError("shadow is missing")

    def _skip(self, chunk: Chunk, why: str) -> None:
        chunk.fault = why
        reason = single_line(why, 200)
        self._problems.append(
            f"chunk at frame {chunk.first}: {reason}; {chunk.count} frames skipped"
        )


def shadow_columns(strings: ChunkStrings) -> tuple[str, ...]:
    """The names of the columns that hold the shadow variants of a chunk."""
    names = [f"shadow{j}" for j in range(len(strings.shadows))]
    return tuple(name + suffix for name in names for suffix in SHADOW_SUFFIXES)
