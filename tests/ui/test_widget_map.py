"""The expert map as text: what each zoom shows, where it stands, what it refreshes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import Color

from moescope.ui.panels import MapData
from moescope.ui.ramp import build
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.map_cells import ABSENT, MapBrush
from moescope.ui.widgets.map_layout import RULER, Layout, plan, ruler
from tests.ui.drawing import lines, map_data, staged, watch_refresh

DEMO = map_data(6, 16, 2, cursor=(2, 5), wrong=[3])


def picks(data: MapData, router: int) -> list[int]:
    return np.flatnonzero(data.marks[router]).tolist()


async def test_the_demo_fills_a_small_screen_with_tiles() -> None:
    widget = ExpertMap()
    async with staged(widget, DEMO, (80, 14)):
        shown = lines(widget)
        layout = widget._layout_now
    assert layout is not None and (layout.zoom, layout.cell_width, layout.cell_height) == (
        "cell",
        4,
        2,
    )
    assert shown[0].split() == [*map(str, range(16)), "Σ"]
    assert [line[:3] for line in shown[1:13:2]] == ["00 ", "01 ", "02▸", "03 ", "04 ", "05 "]
    for router in range(6):
        row = shown[1 + 2 * router]
        assert [x for x, char in enumerate(row) if char == "●"] == [
            3 + 4 * expert + 1 for expert in picks(DEMO, router)
        ]


async def test_numbers_stand_over_their_columns_and_sums_are_marked() -> None:
    widget = ExpertMap()
    async with staged(widget, DEMO, (80, 14)):
        shown = lines(widget)
    assert shown[0].index("15") == 3 + 4 * 15 + 1 - 0
    assert "0.300" in shown[1] and "!" not in shown[1]
    assert "!0.660" in shown[7]
    assert shown[5][3 + 4 * 5 : 3 + 4 * 5 + 3] in ("[ ]", "[●]")


@pytest.mark.parametrize(
    ("size", "routers", "experts", "zoom"),
    [
        ((75, 22), 6, 16, "cell"),
        ((75, 12), 6, 32, "cell"),
        ((138, 50), 48, 128, "cell"),
        ((138, 26), 48, 128, "half"),
        ((73, 13), 48, 128, "braille"),
        ((73, 13), 94, 512, "braille"),
        ((200, 60), 94, 128, "half"),
        ((20, 3), 1, 1, "cell"),
    ],
)
async def test_the_largest_zoom_that_fits(
    size: tuple[int, int], routers: int, experts: int, zoom: str
) -> None:
    widget = ExpertMap()
    data = map_data(routers, experts, min(8, experts), cursor=(routers - 1, experts - 1))
    async with staged(widget, data, size):
        assert widget.zoom_shown == zoom
        shown = lines(widget)
    assert {len(line) for line in shown} == {size[0]}
    assert any("▸" in line for line in shown)  # the cursor's row is in view


async def test_braille_dots_are_the_picks() -> None:
    data = map_data(8, 128, 8, cursor=(0, 0))
    widget = ExpertMap()
    widget.zoom = "braille"
    async with staged(widget, data, (73, 13)):
        shown = lines(widget)
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    for block in range(2):
        drawn = shown[RULER + block][3:67]
        for column, char in enumerate(drawn):
            for row in range(4):
                for side in range(2):
                    picked = data.marks[4 * block + row, 2 * column + side] > 0
                    assert bool((ord(char) - 0x2800) & bits[row, side]) == picked
    assert shown[0].rstrip().endswith("mean Σ")


async def test_half_blocks_show_picks_by_shape_without_colour() -> None:
    data = map_data(4, 64, 8, cursor=(3, 63))
    widget = ExpertMap()
    widget.zoom = "half"
    async with staged(widget, data, (80, 6), colours="none"):
        row = lines(widget)[1][3:67]
    expected = " ▀▄█"
    assert row == "".join(
        expected[int(data.marks[0, e]) + 2 * int(data.marks[1, e])] for e in range(64)
    )


@pytest.mark.parametrize("colours", ["truecolor", "256", "16", "none"])
async def test_picks_load_and_wrong_sums_read_without_colour(colours: str) -> None:
    widget = ExpertMap()
    async with staged(widget, DEMO, (75, 8), colours=colours):
        shown = lines(widget)
    assert sum(line.count("●") for line in shown) == int((DEMO.marks > 0).sum())
    assert sum("!" in line for line in shown) == 1
    if colours in ("16", "none"):
        top = int(DEMO.levels[1].argmax())
        assert set("█▓") & set("".join(shown))
        assert shown[2][3 + 4 * top] in "█▓"


async def test_every_expert_picked_and_experts_that_do_not_exist() -> None:
    all_picked = map_data(3, 8, 8)
    widget = ExpertMap()
    async with staged(widget, all_picked, (75, 6)) as pilot:
        assert [line.count("●") for line in lines(widget)[1:4]] == [8, 8, 8]
        uneven = replace(all_picked, num_experts=np.array([8, 4, 2], np.int16))
        widget.show(uneven)
        await pilot.pause()
        assert [line.count("●") for line in lines(widget)[1:4]] == [8, 4, 2]
        assert widget.cell_at(3 + 4 * 5, 2) is None


async def test_two_lanes_are_told_apart_by_letters() -> None:
    data = map_data(2, 8, 1, right=("1/2", "0/2"))
    data.marks[:] = 0
    data.marks[0, 1], data.marks[0, 2], data.marks[1, 3] = 1, 2, 3
    widget = ExpertMap()
    async with staged(widget, data, (75, 4)):
        shown = lines(widget)
    assert shown[0].rstrip().endswith("differ")
    assert "a" in shown[1] and "b" in shown[1] and "1/2" in shown[1]
    assert "●" in shown[2]


async def test_only_changed_rows_are_refreshed() -> None:
    data = map_data(6, 16, 2, cursor=(0, 0))
    widget = ExpertMap()
    async with staged(widget, data, (75, 8)):
        seen = watch_refresh(widget)
        widget.show(replace(data, levels=data.levels.copy(), marks=data.marks.copy()))
        assert seen == []
        marks = data.marks.copy()
        marks[3] = np.roll(marks[3], 1)
        widget.show(replace(data, marks=marks))
        assert seen == [{1 + 3}]


async def test_a_sum_that_hardly_moved_redraws_nothing() -> None:
    data = map_data(6, 16, 2)
    widget = ExpertMap()
    async with staged(widget, data, (75, 8)):
        seen = watch_refresh(widget)
        widget.show(replace(data, score_sum=data.score_sum + np.float32(1e-5)))
        assert seen == []


async def test_click_and_hover_name_the_cell() -> None:
    widget = ExpertMap()
    async with staged(widget, DEMO, (80, 14)) as pilot:
        await pilot.hover(ExpertMap, offset=(3 + 4 * 7 + 1, 1 + 2 * 4))
        await pilot.click(ExpertMap, offset=(3 + 4 * 7 + 1, 1 + 2 * 4))
        await pilot.pause()
        heard = pilot.app.heard  # type: ignore[attr-defined]
        picked = [each for each in heard if isinstance(each, ExpertMap.Picked)]
        hovered = [each for each in heard if isinstance(each, ExpertMap.Hovered)]
        assert [(each.router, each.expert) for each in picked] == [(4, 7)]
        assert (4, 7) in [each.cell for each in hovered]
        assert "L04 E007" in str(widget.tooltip)


async def test_zoom_steps_and_back() -> None:
    widget = ExpertMap()
    async with staged(widget, map_data(48, 128, 8), (138, 50)) as pilot:
        for zoom in ("half", "braille", "braille"):
            widget.zoom_out()
            await pilot.pause()
            assert widget.zoom_shown == zoom
        widget.zoom_in()
        assert widget.zoom == "half"
        widget.zoom = "auto"
        assert widget.zoom_shown == "cell"
    with pytest.raises(ValueError, match="zoom"):
        widget.zoom = "huge"


async def test_cells_too_many_for_the_screen_scroll_with_the_cursor() -> None:
    data = map_data(94, 256, 8, cursor=(60, 200))
    widget = ExpertMap()
    widget.zoom = "cell"
    async with staged(widget, data, (80, 20)) as pilot:
        shown = lines(widget)
        assert any(line.startswith("60▸") for line in shown)
        assert "200" in shown[0].split()
        widget.show(replace(data, cursor=(0, 0)))
        await pilot.pause()
        shown = lines(widget)
        assert shown[1].startswith("00▸") and shown[0].split()[0] == "0"


async def test_another_theme_redraws_with_its_colours() -> None:
    widget = ExpertMap()
    async with staged(widget, DEMO, (75, 8)) as pilot:
        dark = [segment.style for segment in widget.render_line(1)]
        pilot.app.theme = "textual-light"
        await pilot.pause()
        light = [segment.style for segment in widget.render_line(1)]
        assert dark != light
        text = lines(widget)
        pilot.app.theme = "textual-dark"
        await pilot.pause()
        assert [segment.style for segment in widget.render_line(1)] == dark
        assert lines(widget) == text


async def test_nothing_yet_and_no_routers() -> None:
    widget = ExpertMap()
    async with staged(widget, None, (75, 8)) as pilot:
        assert lines(widget)[0].startswith(ExpertMap.EMPTY)
        widget.show(map_data(0, 0, 0))
        await pilot.pause()
        assert lines(widget)[0].startswith(ExpertMap.EMPTY)


@pytest.mark.parametrize("depth", ["truecolor", "16", "none"])
@given(st.lists(st.sampled_from([*range(64), ABSENT]), min_size=1, max_size=140))
def test_runs_of_cells_are_the_cells(depth: Any, codes: list[int]) -> None:
    ink, paper = Color.parse("#e0e0e0"), Color.parse("#121212")
    brush = MapBrush(build(depth, True, ink, paper), compare=True)
    drawn = brush.cells(np.array(codes, np.uint8), 0, 1, 1)
    one_by_one = [(char, part.style) for part in drawn for char in part.text]
    assert one_by_one == [brush._narrow_tile(code) for code in codes]


sizes = st.tuples(st.integers(1, 220), st.integers(1, 70))
shapes = st.tuples(st.integers(1, 100), st.integers(1, 600))


@settings(max_examples=300, deadline=None)
@given(sizes, shapes, st.sampled_from(["auto", "cell", "half", "braille"]), st.data())
def test_any_arrangement_stays_inside_and_hits_what_it_shows(
    size: tuple[int, int], shape: tuple[int, int], zoom: str, draw: st.DataObject
) -> None:
    routers, experts = shape
    cursor = draw.draw(st.tuples(st.integers(0, routers - 1), st.integers(0, experts - 1)))
    layout = plan(*size, routers, experts, cursor, zoom=zoom)
    assert layout.gutter + layout.columns + layout.sum_width <= max(size[0], layout.gutter + 1 + 6)
    assert RULER + layout.rows <= max(size[1], 2)
    assert layout.first_router <= cursor[0] < layout.first_router + layout.routers
    assert layout.first_expert <= cursor[1] < layout.first_expert + layout.experts
    if layout.zoom == "braille" and layout.merge > 1:  # no more experts behind a dot than needed
        assert -(-experts // layout.merge) > size[0] - layout.gutter - layout.sum_width
    found = where(layout, cursor)
    cell = layout.cell_at(*found)
    assert cell is not None
    assert 0 <= cursor[0] - cell[0] < layout.per_row
    assert 0 <= cursor[1] - cell[1] < layout.per_column
    line, (start, end) = ruler(layout, cursor[1])
    assert end <= len(line) and (line[start:end] == str(cursor[1]) or layout.columns < 4)


def where(layout: Layout, cell: tuple[int, int]) -> tuple[int, int]:
    row = (cell[0] - layout.first_router) // layout.per_row * layout.cell_height
    return layout.gutter + layout.column_of(cell[1]), RULER + row
