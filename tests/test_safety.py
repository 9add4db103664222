"""The gate: nothing a terminal acts on comes out of it, wherever the text was cut."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.safety import escape_char, printable, single_line

ANYTHING = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs", "Mn"]),
        st.sampled_from("\x1b\x07\x9b\x9d\x90[]0;\r\n\t\u202e\u200b\U000e0041\ufeff\ud800"),
    ),
    max_size=80,
)
HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "clipboard": "\x1b]52;c;aGk=\x07",
    "title": "\x1b]0;owned\x1b\\",
    "report": "\x1b[6n",
    "reset": "\x1bc",
    "device string": "\x1bP$q\x1b\\",
    "8-bit": "\x9b2J \x9d0;x\x9c \x90q\x9c",
    "carriage return": "good\rbad\x08\x7f\x00\x0b\x0c",
    "bidi": "\u202egnp.exe \u2066x\u2069 \u200f",
    "hidden": "a\u200bb\ufeffc\u00ad\u2060\U000e0041\U000e0100",
    "separators": "a\u2028b\u2029c\x85",
    "lone surrogate": "\ud83d",
    "private": "\ue000\U000f0000\uffff",
}


def harmless(text: str) -> bool:
    """No control, format, surrogate, private or unassigned character but LF."""
    return all(
        char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        for char in text
    )


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_shown_and_not_obeyed(text: str) -> None:
    shown = printable(text)
    assert harmless(shown)
    assert shown != text
    shown.encode()


@given(ANYTHING)
@settings(max_examples=800, deadline=None)
def test_nothing_a_terminal_acts_on_comes_out(text: str) -> None:
    shown = printable(text, None)
    assert harmless(shown)
    assert printable(shown, None) == shown
    assert "\n" not in single_line(text)


@given(ANYTHING, st.integers(0, 80))
@settings(max_examples=500, deadline=None)
def test_a_cut_anywhere_gives_the_same_text(text: str, cut: int) -> None:
    parts = printable(text[:cut], None) + printable(text[cut:], None)
    assert parts == printable(text, None)


@given(ANYTHING, st.integers(0, 40))
@settings(max_examples=500, deadline=None)
def test_a_limit_holds_and_is_stable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert printable(shown, limit) == shown
    whole = printable(text, None)
    assert shown == whole or shown == whole[: max(limit - 1, 0)] + "…"[:limit]


def test_what_escapes_look_like() -> None:
    assert printable("\x1b[31m") == "\\x1b[31m"
    assert printable("a\tb\u202e\U000e0041\x9b") == "a    b<U+202E><U+E0041>\\x9b"
    assert single_line("a\nb") == "a\\nb"
    assert printable("naïve 你好 ▁Ġ 🙂 \u00a0\n") == "naïve 你好 ▁Ġ 🙂 \u00a0\n"
    assert escape_char("\n") == "\n" and escape_char("x") == "x"


def test_a_long_line_costs_no_more_than_its_limit() -> None:
    assert len(printable("\x1b" * 10_000_000)) == 4096


def test_the_gate_imports_the_standard_library_only() -> None:
    code = "import sys, moescope.safety; print([m for m in sys.modules if m.split('.')[0] in\
 ('numpy','torch','rich','textual')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
