"""Text in cells: fitting, wrapping, figures, and the filter behind every widget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.segment import Segment
from rich.style import Style
from textual.color import Color

from moescope.safety import escape_char
from moescope.ui.text import ControlFilter, cells, cut, fit, is_plain, number, plain, wrap

HOSTILE = "\x1b]0;owned\x07\u202e\u200b\U000e0041\U000e0100\x9b31m\r\b\x7f\udc80\ufeff\u2028[/red]"
texts = st.text(max_size=80) | st.text(alphabet="ab 日本\n\t[]é\u0301\x1b", max_size=120)


def filtered(*segments: Segment) -> list[Segment]:
    return ControlFilter().apply(list(segments), Color(0, 0, 0))


@given(texts)
def test_nothing_that_a_terminal_acts_on_passes_the_filter(text: str) -> None:
    shown = "".join(segment.text for segment in filtered(Segment(text)))
    assert all(escape_char(char) == char and char != "\n" for char in shown)


@given(texts)
def test_the_filter_keeps_the_width_of_a_line(text: str) -> None:
    before = [Segment(text, Style(bold=True)), Segment("│", Style())]
    after = filtered(*before)
    assert sum(part.cell_length for part in after) == sum(part.cell_length for part in before)


def test_the_filter_passes_what_is_plain_untouched() -> None:
    line = [Segment("● ▐█▌ 日本 é", Style(bold=True))]
    assert filtered(*line) == line


@given(texts)
def test_the_short_cut_agrees_with_the_rule(text: str) -> None:
    if is_plain(text):
        assert plain(text) == text == "".join(map(escape_char, text))


@given(texts, st.integers(0, 40), st.sampled_from("<>^"))
def test_fit_is_exact(text: str, width: int, align: str) -> None:
    fitted = fit(text, width, align)
    assert cells(fitted) == width
    assert is_plain(fitted) or plain(fitted) == fitted


def test_cut_says_that_something_is_missing() -> None:
    assert cut("expert", 6) == "expert"
    assert cut("experts", 6) == "exper…"
    assert cut("日本語", 5) == "日本…"
    assert cut("日本語", 4) == "日…"
    assert cut("x", 0) == ""


@given(texts, st.integers(2, 30))
def test_wrapped_lines_hold_the_text_and_fit(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert "".join(lines) == text.replace("\n", "")
    assert all(cells(line) <= width for line in lines)


def test_wrap_breaks_after_blanks() -> None:
    assert wrap("the sum of the weights", 8) == ["the sum ", "of the ", "weights"]
    assert wrap("incomprehensible", 6) == ["incomp", "rehens", "ible"]
    assert wrap("a\nb", 8) == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.7312, "0.731"),
        (12.3456, "12.35"),
        (431.7, "431.7"),
        (-3.21987, "-3.220"),
        (123456.0, "1e5"),
        (math.nan, "─"),
        (None, "─"),
        (math.inf, "∞"),
    ],
)
def test_figures_stay_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 9.99, 12.345, 99.96, 431.0, 9999.0, 1e7, -5.0])
def test_figures_of_the_sum_column_have_four_characters(value: float) -> None:
    assert len(number(value, 2)) <= 5


def test_hostile_text_is_visible() -> None:
    shown = plain(HOSTILE)
    assert "\\x1b" in shown and "<U+202E>" in shown and "[/red]" in shown
    assert is_plain(shown)
