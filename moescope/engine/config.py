"""Strict JSON, and typed access to the fields of a config that somebody else wrote.

`parse_json` refuses what `json` lets pass (duplicate keys, NaN, endless nesting and integers);
`Fields` reads one object by name and type, so that a family states what it expects and the user
reads `config.json: num_experts: expected an integer 1..4096, found "8"`. Files are `files.py`'s.
"""

from __future__ import annotations

import builtins
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, single_line

D = TypeVar("D")
Names = str | tuple[str, ...]
_MAX = sys.float_info.max

_SYNTAX = {
    "Expecting value": "expected a value",
    "Expecting ',' delimiter": "expected ','",
    "Expecting ':' delimiter": "expected ':'",
    "Expecting property name enclosed in double quotes": "expected a name in double quotes",
    "Illegal trailing comma before end of object": "expected a name in double quotes",
    "Illegal trailing comma before end of array": "expected a value",
    "Extra data": "expected the end of the file",
    "Unterminated string starting at": "expected the closing quote of this string",
    "Invalid control character at": "expected no control character in a string",
    "Invalid \\escape": "expected a valid escape",
    "Invalid \\uXXXX escape": "expected four hexadecimal digits",
}
_WIDE = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"{\x00", "UTF-16"),
    (b"\x00{", "UTF-16"),
)


def bad(message: str, hint: str = "") -> MoescopeError:
    """The error for a checkpoint at fault."""
    return MoescopeError(message, hint=hint, code=ExitCode.CHECKPOINT)


def shown(value: Any, limit: int = 60) -> str:
    """A foreign JSON value as it appears after `found`."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, str):
        value = value[: limit + 1]
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return single_line(text, limit)


class _NotANumber(float):
    """A number JSON text held that no field may have; `text` says which."""

    text: str


_NOT_PLAIN = frozenset({dict, list, _NotANumber})


def _refused(text: str) -> _NotANumber:
    marker = _NotANumber("nan")
    marker.text = text
    return marker


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text if len(text) < 24 else "a huge number")


_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def parse_json(data: bytes, file: str) -> Any:
    """The value in `data`, or a MoescopeError that names `file` and the place.

    UTF-8, with or without a byte order mark. `{"__float__": "Infinity"}`, which transformers 5
    writes, becomes the float it means; any other number that is not finite is refused.
    """

    def pairs(items: list[tuple[str, Any]]) -> Any:
        found = dict(items)
        if len(found) != len(items):
            name, count = Counter(name for name, _ in items).most_common(1)[0]
            raise bad(f"{file}: {single_line(name, 80)}: expected one entry, found {count}")
        if len(found) == 1 and isinstance(meant := found.get("__float__"), str):
            return _FLOATS.get(meant, found)
        return found

    for mark, encoding in _WIDE:
        if data.startswith(mark):
            raise bad(f"{file}: expected UTF-8, found {encoding}")
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=_refused, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise bad(f"{file}: byte {error.start}: expected UTF-8") from None
    except json.JSONDecodeError as error:
        what = _SYNTAX.get(error.msg, "expected JSON")
        raise bad(f"{file}: line {error.lineno} column {error.colno}: {what}") from None
    except RecursionError:
        raise bad(f"{file}: expected at most {LIMITS.json_depth} levels of nesting") from None
    except ValueError:  # of int(), beyond some thousands of digits
        raise bad(f"{file}: expected integers of fewer digits") from None
    _check_tree(value, file)
    return value


def parse_object(data: bytes, file: str) -> dict[str, Any]:
    """`parse_json`, where the file must hold one object."""
    value = parse_json(data, file)
    if not isinstance(value, dict):
        raise bad(f"{file}: expected an object, found {shown(value)}")
    return value


def _check_tree(value: Any, file: str) -> None:
    """Refuse refused numbers, by key, and deep nesting."""
    level: list[tuple[str, Any]] = [("", value)] if type(value) in _NOT_PLAIN else []
    for _ in range(LIMITS.json_depth + 1):
        below: list[tuple[str, Any]] = []
        for name, item in level:
            if type(item) is dict:
                below += [pair for pair in item.items() if type(pair[1]) in _NOT_PLAIN]
            elif type(item) is list:
                below += [(name, element) for element in item if type(element) in _NOT_PLAIN]
            else:
                place = f"{file}: {single_line(name, 80)}" if name else file
                raise bad(f"{place}: expected a finite number, found {item.text}")
        if not below:
            return
        level = below
    raise bad(f"{file}: expected at most {LIMITS.json_depth} levels of nesting")


class _Required:
    pass


_REQUIRED = _Required()


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a config, read by name and type.

    Every reader takes a name or a tuple of names that mean the same (the dialects of one field);
    aliases that are both present must agree. An absent or null field gives `default`, or an error
    where there is none. Types are strict: true is not an integer, nor is 4096.0 or "8".
    """

    values: Mapping[str, Any]
    file: str = "config.json"
    prefix: str = ""

    def has(self, names: Names) -> builtins.bool:
        """Whether the field is there and not null."""
        return self.raw(names) is not None

    def raw(self, names: Names) -> Any:
        """The unchecked value, None where absent."""
        aliases = (names,) if isinstance(names, str) else names
        found = [name for name in aliases if self.values.get(name) is not None]
        for other in found[1:]:
            if not _same(self.values[found[0]], self.values[other]):
                raise bad(
                    f"{self.place(found[0])}: expected the same as {other} "
                    f"({shown(self.values[other])}), found {shown(self.values[found[0]])}"
                )
        return self.values[found[0]] if found else None

    def place(self, names: Names) -> str:
        """`config.json: rope_parameters.rope_theta`, the beginning of every message."""
        aliases = (names,) if isinstance(names, str) else names
        name = next((alias for alias in aliases if alias in self.values), aliases[0])
        return f"{self.file}: {single_line(self.prefix + name, 120)}"

    def error(self, names: Names, expected: str, hint: str = "") -> MoescopeError:
        """The error for a field whose value does not fit; the caller raises it."""
        aliases = (names,) if isinstance(names, str) else names
        name = next((alias for alias in aliases if alias in self.values), None)
        found = "nothing" if name is None else shown(self.values[name])
        return bad(f"{self.place(names)}: expected {expected}, found {found}", hint)

    @overload
    def int(self, names: Names, lo: builtins.int, hi: builtins.int) -> builtins.int: ...
    @overload
    def int(
        self, names: Names, lo: builtins.int, hi: builtins.int, default: D
    ) -> builtins.int | D: ...
    def int(
        self, names: Names, lo: builtins.int, hi: builtins.int, default: Any = _REQUIRED
    ) -> Any:
        """An integer of lo..hi."""
        value = self.raw(names)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not builtins.int or not lo <= value <= hi:
            raise self.error(names, f"an integer {lo}..{hi}")
        return value

    @overload
    def float(
        self, names: Names, lo: builtins.float = ..., hi: builtins.float = ...
    ) -> builtins.float: ...
    @overload
    def float(
        self, names: Names, lo: builtins.float = ..., hi: builtins.float = ..., *, default: D
    ) -> builtins.float | D: ...
    @overload
    def float(
        self, names: Names, lo: builtins.float, hi: builtins.float, default: D
    ) -> builtins.float | D: ...
    def float(
        self,
        names: Names,
        lo: builtins.float = -_MAX,
        hi: builtins.float = _MAX,
        default: Any = _REQUIRED,
    ) -> Any:
        """A finite number of lo..hi; infinite only where a bound given is infinite."""
        value = self.raw(names)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is builtins.int and abs(value) <= _MAX:
            value = builtins.float(value)
        if type(value) is not builtins.float or not lo <= value <= hi:
            raise self.error(names, _range(lo, hi))
        return value

    @overload
    def bool(self, names: Names) -> builtins.bool: ...
    @overload
    def bool(self, names: Names, default: D) -> builtins.bool | D: ...
    def bool(self, names: Names, default: Any = _REQUIRED) -> Any:
        """true or false."""
        value = self.raw(names)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not builtins.bool:
            raise self.error(names, "true or false")
        return value

    @overload
    def str(self, names: Names, choices: Sequence[builtins.str] | None = ...) -> builtins.str: ...
    @overload
    def str(
        self, names: Names, choices: Sequence[builtins.str] | None = ..., *, default: D
    ) -> builtins.str | D: ...
    @overload
    def str(
        self, names: Names, choices: Sequence[builtins.str] | None, default: D
    ) -> builtins.str | D: ...
    def str(
        self,
        names: Names,
        choices: Sequence[builtins.str] | None = None,
        default: Any = _REQUIRED,
    ) -> Any:
        """A string, one of `choices` where they are given."""
        value = self.raw(names)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not builtins.str or (choices is not None and value not in choices):
            raise self.error(names, "one of " + ", ".join(choices) if choices else "a string")
        return value

    @overload
    def list(
        self, names: Names, of: type[D], length: builtins.int | None = ...
    ) -> builtins.list[D]: ...
    @overload
    def list(
        self, names: Names, of: type[D], length: builtins.int | None = ..., *, default: Any
    ) -> Any: ...
    def list(
        self,
        names: Names,
        of: type[Any],
        length: builtins.int | None = None,
        default: Any = _REQUIRED,
    ) -> Any:
        """A list of `length` items of one type (int, float, bool, str, dict)."""
        value = self.raw(names)
        if value is None and default is not _REQUIRED:
            return default
        allowed = (builtins.int, builtins.float) if of is builtins.float else (of,)
        fits = isinstance(value, builtins.list) and all(type(item) in allowed for item in value)
        if not fits or (length is not None and len(value) != length):
            count = "" if length is None else f"{length} "
            raise self.error(names, f"a list of {count}{_PLURALS.get(of, of.__name__)}")
        return value

    def renamed(self, aliases: Mapping[builtins.str, builtins.str]) -> Fields:
        """The same object with fields called by their other name; two that differ are refused."""
        values = {name: value for name, value in self.values.items() if name not in aliases}
        for old, new in aliases.items():
            if old in self.values and (found := self.raw((new, old))) is not None:
                values[new] = found
        return Fields(values, self.file, self.prefix)

    def fields(self, names: Names) -> Fields | None:
        """The object under this name, None where absent."""
        value = self.raw(names)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(names, "an object")
        name = self.place(names).removeprefix(f"{self.file}: ")
        return Fields(value, self.file, f"{name}.")


_PLURALS: dict[type, str] = {
    int: "integers",
    float: "numbers",
    bool: "true or false",
    str: "strings",
    dict: "objects",
}


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true are three values."""
    return type(a) is type(b) and bool(a == b)


def _range(lo: float, hi: float) -> str:
    if lo <= -_MAX and hi >= _MAX:
        return "a number"
    if hi >= _MAX:
        return f"a number of at least {lo:g}"
    if lo <= -_MAX:
        return f"a number of at most {hi:g}"
    return f"a number {lo:g}..{hi:g}"
