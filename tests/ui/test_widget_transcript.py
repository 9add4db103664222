"""The transcript: nothing lost, tokens find themselves, the end stays in view, little redrawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.ui.panels import TokenCell
from moescope.ui.text import cells, plain
from moescope.ui.widgets.transcript import WHEEL, Transcript
from moescope.ui.widgets.transcript_rows import LINE_FEED, Rows
from tests.ui.drawing import lines, staged, transcript, watch_refresh

TEXT = "The top-k scores rarely add up to one , so a wrong router stays fluent .\n"
TOKENS = [" " + word for word in TEXT.split(" ")]
pieces = st.text(max_size=12) | st.sampled_from([" the", " ", "\n", "\n\n", "日本", "é", "x" * 30])


def wrapped(tokens: list[str], width: int) -> Rows:
    rows = Rows(width)
    for token in tokens:
        rows.append(token)
    return rows


@given(st.lists(pieces, max_size=30), st.integers(1, 30))
def test_rows_hold_the_text_and_fit(tokens: list[str], width: int) -> None:
    rows = wrapped(tokens, width)
    text = "".join(text for row in rows.rows for text, _, _ in row)
    assert text == LINE_FEED.join(plain(part) for part in "".join(tokens).split(LINE_FEED))
    for row in rows.rows:
        taken = sum(size for _, _, size in row)
        shown = "".join(text for text, _, _ in row).rstrip(" \n")
        assert taken <= max(width, 2)
        assert cells(shown) <= max(width, 2)


@given(st.lists(pieces, min_size=1, max_size=30), st.integers(2, 30))
def test_every_token_hits_itself(tokens: list[str], width: int) -> None:
    rows = wrapped(tokens, width)
    for number, row in enumerate(rows.rows):
        left = 0
        for _, token, size in row:
            if size:
                assert (
                    rows.token_at(number, left) == rows.token_at(number, left + size - 1) == token
                )
            assert number in rows.rows_of(token)
            left += size
    for token in range(len(tokens)):
        found = {n for n, row in enumerate(rows.rows) if any(each[1] == token for each in row)}
        assert found <= set(rows.rows_of(token))


@given(st.lists(pieces, max_size=30), st.integers(1, 30), st.data())
def test_growing_by_parts_is_growing_at_once(
    tokens: list[str], width: int, draw: st.DataObject
) -> None:
    rows = Rows(width)
    for token in tokens:
        before = [list(row) for row in rows.rows[:-1]]
        rows.append(token)
        assert rows.rows[: len(before)] == before  # only the last row ever changes
    assert rows.rows == wrapped(tokens, width).rows


def test_words_are_not_cut_where_a_blank_stands() -> None:
    rows = wrapped(["The", " top", "-k", " scores", " rarely"], 12)
    assert ["".join(text for text, _, _ in row) for row in rows.rows] == [
        "The top-k ",
        "scores ",
        "rarely",
    ]


async def test_the_last_row_stays_in_view_from_the_first_overflow_on() -> None:
    widget = Transcript()
    async with staged(widget, transcript([]), (30, 5)) as pilot:
        assert lines(widget)[0].startswith(Transcript.EMPTY)
        for count in range(1, 60):
            widget.show(transcript(f" word{number}" for number in range(count)))
            await pilot.pause()
            assert f"word{count - 1}" in "".join(lines(widget))


async def test_scrolling_away_stops_following_and_the_end_resumes_it() -> None:
    widget = Transcript()
    texts = [f" word{number}" for number in range(100)]
    async with staged(widget, transcript(texts), (30, 6)) as pilot:
        bottom = lines(widget)
        widget.scroll_rows(-WHEEL)
        assert not widget.following
        kept = lines(widget)
        assert kept != bottom
        texts.append(" more")
        widget.show(transcript(texts))
        await pilot.pause()
        assert lines(widget)[1][:20] == kept[1][:20]
        widget.end()
        assert widget.following
        assert "more" in "".join(lines(widget))
        widget.home()
        assert lines(widget)[0].startswith(" word0")


async def test_the_data_decides_about_following_when_it_changes() -> None:
    widget = Transcript()
    texts = [f" word{number}" for number in range(100)]
    async with staged(widget, transcript(texts), (30, 6)) as pilot:
        widget.show(transcript(texts, follow=False, cursor=3))
        await pilot.pause()
        assert "word3" in "".join(lines(widget))
        widget.show(transcript(texts, follow=True, cursor=99))
        await pilot.pause()
        assert "word99" in "".join(lines(widget))


async def test_a_token_costs_its_own_row() -> None:
    widget = Transcript()
    texts = ["one", " two"]
    async with staged(widget, transcript(texts), (40, 6)):
        seen = watch_refresh(widget)
        widget.show(transcript([*texts, " three"]))
        assert set().union(*seen) == {0} and set() not in seen
        seen.clear()
        widget.show(transcript([*texts, " three"], cursor=1))
        assert set().union(*seen) == {0}
        seen.clear()
        widget.show(transcript([*texts, " three"], cursor=1))
        assert seen == []


async def test_a_moved_cursor_redraws_the_rows_it_left_and_entered() -> None:
    widget = Transcript()
    texts = ["first\n", "second\n", "third"]
    async with staged(widget, transcript(texts, cursor=0), (40, 6)) as pilot:
        seen = watch_refresh(widget)
        widget.show(transcript(texts, cursor=2))
        assert set().union(*seen) == {0, 2}
        await pilot.pause()
        marked = [any(part.style.reverse for part in widget.render_line(y)) for y in range(3)]
        assert marked == [False, False, True]


async def test_new_tints_and_new_text_redraw() -> None:
    widget = Transcript()
    data = transcript(["one", " two"])
    async with staged(widget, data, (40, 4)) as pilot:
        before = [segment.style for segment in widget.render_line(0)]
        cells_now = tuple(replace(cell, level=7) for cell in data.cells)
        widget.show(replace(data, cells=cells_now, tint_epoch=1))
        await pilot.pause()
        assert [segment.style for segment in widget.render_line(0)] != before
        widget.show(transcript(["other"], epoch=1))
        await pilot.pause()
        assert lines(widget)[0].rstrip() == "other"
        widget.show(None)
        await pilot.pause()
        assert lines(widget)[0].startswith(Transcript.EMPTY)


async def test_prompt_special_marked_and_cursor_differ_also_without_colour() -> None:
    cells_ = (
        TokenCell("plain", 4, 0),
        TokenCell("special", 4, 1, "special"),
        TokenCell("marked", 4, 2, "text", True),
        TokenCell("cursor", 4, 3),
    )
    data = replace(transcript([]), cells=cells_, cursor=3)
    for colours in ("truecolor", "256", "16", "none"):
        widget = Transcript()
        async with staged(widget, data, (60, 3), colours=colours):
            styles = [segment.style for segment in widget.render_line(0)][:4]
        assert len(set(styles)) == 4
        assert styles[2].underline and styles[3].reverse


async def test_a_line_feed_can_be_the_cursor() -> None:
    widget = Transcript()
    async with staged(widget, transcript(["a", "\n", "b"], cursor=1), (20, 4)) as pilot:
        assert [line.rstrip() for line in lines(widget)[:2]] == ["a⏎", "b"]
        widget.show(transcript(["a", "\n", "b"], cursor=0))
        await pilot.pause()
        assert lines(widget)[0].rstrip() == "a"


async def test_a_click_names_the_token() -> None:
    widget = Transcript()
    async with staged(widget, transcript(["one", " two", " three"]), (40, 4)) as pilot:
        await pilot.click(Transcript, offset=(5, 0))
        await pilot.pause()
        heard = pilot.app.heard  # type: ignore[attr-defined]
        assert [each.index for each in heard if isinstance(each, Transcript.Picked)] == [1]


async def test_resizing_wraps_anew_and_keeps_the_end() -> None:
    widget = Transcript()
    texts = [f" word{number}" for number in range(100)]
    async with staged(widget, transcript(texts), (60, 6)) as pilot:
        await pilot.resize_terminal(25, 4)
        await pilot.pause()
        shown = lines(widget)
        assert {cells(line) for line in shown} == {25}
        assert "word99" in "".join(shown)


async def test_keys_scroll_when_it_has_the_focus() -> None:
    widget = Transcript()
    async with staged(widget, transcript([f" w{n}" for n in range(300)]), (30, 6)) as pilot:
        widget.focus()
        await pilot.press("home")
        assert lines(widget)[0].startswith(" w0")
        await pilot.press("pagedown", "end")
        assert "w299" in "".join(lines(widget))


@pytest.mark.slow
def test_thousands_of_tokens_cost_the_same_each() -> None:
    import time

    def seconds(rows: Rows) -> float:
        start = time.perf_counter()
        for _ in range(20):
            for token in TOKENS:
                rows.append(token)
        return time.perf_counter() - start

    rows = Rows(60)
    first = min(seconds(Rows(60)) for _ in range(5))
    for _ in range(20):
        seconds(rows)
    assert min(seconds(rows) for _ in range(5)) < 5 * first
