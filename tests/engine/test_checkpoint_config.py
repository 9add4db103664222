"""Typed access to config fields: strict in type and range, both dialects, and nothing but errors of
ours for whatever a file holds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine.config import Fields, parse_json, parse_object
from moescope.errors import MoescopeError
from moescope.safety import printable

VALUES: dict[str, Any] = {
    "eight": 8,
    "true": True,
    "float": 8.0,
    "text": "8",
    "null": None,
    "huge": 10**400,
    "infinite": math.inf,
    "nan": math.nan,
    "list": [1, 2],
    "mixed": [1, True],
    "object": {"rope_theta": 1e4, "deep": {"x": "\x1b"}},
}
F = Fields(VALUES)

READS: dict[str, tuple[Any, Any]] = {
    "an integer": (lambda: F.int("eight", 1, 9), 8),
    "too large": (lambda: F.int("eight", 1, 7), "eight: expected an integer 1..7, found 8"),
    "true is none": (lambda: F.int("true", 0, 9), "true: expected an integer 0..9, found true"),
    "8.0 is none": (lambda: F.int("float", 0, 9), "float: expected an integer 0..9, found 8.0"),
    '"8" is none': (lambda: F.int("text", 0, 9), 'text: expected an integer 0..9, found "8"'),
    "null is absent": (lambda: F.int("null", 0, 9, 5), 5),
    "null is missing": (lambda: F.int("null", 0, 9), "null: expected an integer 0..9, found null"),
    "nothing": (lambda: F.int("gone", 0, 9), "gone: expected an integer 0..9, found nothing"),
    "a default": (lambda: F.int("gone", 0, 9, None), None),
    "another name": (lambda: F.int(("gone", "eight"), 0, 9), 8),
    "names that agree": (lambda: Fields({"a": 1, "b": 1}).int(("a", "b"), 0, 9), 1),
    "names that do not": (
        lambda: Fields({"a": 1, "b": 2}).int(("a", "b"), 0, 9),
        "a: expected the same as b (2), found 1",
    ),
    "names of two types": (
        lambda: Fields({"a": 1, "b": True}).int(("a", "b"), 0, 9),
        "a: expected the same as b (true), found 1",
    ),
    "a number": (lambda: F.float("float"), 8.0),
    "a whole number": (lambda: F.float("eight", 0.0, 9.0), 8.0),
    "no number": (lambda: F.float("text"), 'text: expected a number, found "8"'),
    "true is no number": (lambda: F.float("true"), "true: expected a number, found true"),
    "infinite is refused": (lambda: F.float("infinite"), "expected a number, found Infinity"),
    "infinite is allowed": (lambda: F.float("infinite", 0, math.inf), math.inf),
    "nan is refused": (lambda: F.float("nan", 0, math.inf), "expected a number of at least 0"),
    "beyond floats": (
        lambda: F.float("huge", 0, math.inf),
        "huge: expected a number of at least 0",
    ),
    "a range": (lambda: F.float("float", 0, 1), "float: expected a number 0..1, found 8.0"),
    "truth": (lambda: F.bool("true"), True),
    "1 is no truth": (lambda: F.bool("eight"), "eight: expected true or false, found 8"),
    "a choice": (lambda: F.str("text", ("7", "8")), "8"),
    "another choice": (lambda: F.str("text", ("silu",)), 'expected one of silu, found "8"'),
    "no text": (lambda: F.str("eight"), "eight: expected a string, found 8"),
    "a list": (lambda: F.list("list", int), [1, 2]),
    "a list of floats": (lambda: F.list("list", float, 2), [1, 2]),
    "a list of three": (lambda: F.list("list", int, 3), "expected a list of 3 integers"),
    "a mixed list": (lambda: F.list("mixed", int), "mixed: expected a list of integers"),
    "no list": (lambda: F.list("eight", str), "eight: expected a list of strings, found 8"),
    "no object": (lambda: F.fields("eight"), "eight: expected an object, found 8"),
    "an absent object": (lambda: F.fields("gone"), None),
    "inside": (lambda: F.fields("object").float("rope_theta"), 1e4),  # type: ignore[union-attr]
    "deep inside": (
        lambda: F.fields("object").fields("deep").int("x", 0, 1),  # type: ignore[union-attr]
        'object.deep.x: expected an integer 0..1, found "\\u001b"',
    ),
}


@pytest.mark.parametrize("read, expected", READS.values(), ids=READS)
def test_fields_are_read_strictly(read: Any, expected: Any) -> None:
    try:
        found = read()
    except MoescopeError as error:
        assert isinstance(expected, str) and expected in error.message
        assert error.message.startswith("config.json: ")
        assert error.message == printable(error.message)
    else:
        assert found == expected and type(found) is type(expected)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused(value: Any) -> None:
    text = json.dumps(value).encode()
    finite = not any(word in text for word in (b"NaN", b"Infinity")) or b'"' in text
    try:
        found = parse_json(text, "x.json")
    except MoescopeError as error:
        assert "expected a finite number" in error.message
        assert error.message == printable(error.message)
    else:
        assert finite and found == json.loads(text)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_object(data, "x.json")
    except MoescopeError as error:
        assert error.message.startswith("x.json: ")
        assert error.message == printable(error.message) and "\n" not in error.message


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_value_of_a_field_is_typed_or_refused(value: Any) -> None:
    fields = Fields({"x": value})
    reads = (
        lambda: fields.int("x", -5, 5, 0),
        lambda: fields.float("x", 0.0, 5.0, default=0.0),
        lambda: fields.bool("x", False),
        lambda: fields.str("x", default=""),
        lambda: fields.list("x", int, default=[]),
        lambda: fields.fields("x") or fields,
    )
    for read, kind in zip(reads, (int, float, bool, str, list, Fields), strict=True):
        try:
            assert type(read()) is kind
        except MoescopeError as error:
            assert error.message.startswith("config.json: x: expected ")
            assert error.message == printable(error.message) and len(error.message) < 200
