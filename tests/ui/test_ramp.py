"""Colours: monotone in lightness in every theme and depth, and nothing said by colour alone."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from rich.color import Color, ColorSystem
from textual.theme import BUILTIN_THEMES

from moescope.ui.panels import LEVELS
from moescope.ui.ramp import (
    BARS,
    SHADES,
    Pens,
    bar,
    build,
    depth_of,
    lightness,
    quantise,
    sum_bar,
    thin_bar,
)

PAPERS = {
    name: (theme.dark, theme.background or ("#121212" if theme.dark else "#e0e0e0"))
    for name, theme in BUILTIN_THEMES.items()
    if not theme.ansi
}
DEPTHS = ("truecolor", "256", "16", "none")


def pens(depth: Any, dark: bool, paper: str) -> Pens:
    ink = "#e0e0e0" if dark else "#1e1e1e"
    return build(depth, dark, Color.parse(ink), Color.parse(paper), Color.parse("#0178d4"))


@pytest.mark.parametrize("theme", PAPERS)
@pytest.mark.parametrize("depth", ["truecolor", "256"])
def test_load_moves_away_from_the_panel_step_by_step(theme: str, depth: str) -> None:
    dark, paper = PAPERS[theme]
    ramp = [colour for colour in pens(depth, dark, paper).ramp if colour is not None]
    light = [lightness(colour) for colour in ramp]
    assert len(ramp) == LEVELS
    assert light == sorted(light, reverse=not dark)
    # what colour blindness leaves is lightness: neighbours must differ in it
    least = 0.025 if depth == "truecolor" else 0.015
    assert min(abs(a - b) for a, b in pairwise(light[1:])) > least


@pytest.mark.parametrize("theme", PAPERS)
def test_low_load_is_blue_and_high_load_orange(theme: str) -> None:
    dark, paper = PAPERS[theme]
    ramp = pens("truecolor", dark, paper).ramp
    low, high = (ramp[level].get_truecolor() for level in (1, LEVELS - 1))  # type: ignore[union-attr]
    assert low.blue > low.red
    assert high.red > high.green > high.blue


@pytest.mark.parametrize("theme", PAPERS)
def test_marks_and_text_stand_out_on_every_level(theme: str) -> None:
    dark, paper = PAPERS[theme]
    drawn = pens("truecolor", dark, paper)
    for style in (*drawn.load, *drawn.tint[1:]):
        assert style.color is not None and style.bgcolor is not None
        assert contrast(style.color, style.bgcolor) > 3.5


def contrast(one: Color, other: Color) -> float:
    """WCAG's contrast ratio."""
    lights = []
    for colour in (one, other):
        channels = [value / 255 for value in colour.get_truecolor()]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        lights.append(0.2126 * r + 0.7152 * g + 0.0722 * b)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_256_colours_are_of_the_palette() -> None:
    for dark, paper in ((True, "#121212"), (False, "#e0e0e0")):
        ramp = pens("256", dark, paper).ramp
        assert all(colour == colour.downgrade(ColorSystem.EIGHT_BIT) for colour in ramp if colour)
        assert len(set(ramp)) == LEVELS


@pytest.mark.parametrize("depth", DEPTHS)
def test_all_depths_have_the_same_pens(depth: str) -> None:
    names = pens("truecolor", True, "#121212").style.keys()
    drawn = pens(depth, True, "#121212")
    assert drawn.style.keys() == names == drawn.ink.keys()
    assert {len(drawn.load), len(drawn.load_ink), len(drawn.load_soft), len(drawn.tint)} == {LEVELS}


def test_without_colour_no_pen_has_one() -> None:
    drawn = pens("none", True, "#121212")
    base = drawn.style["text"]
    every = [*drawn.style.values(), *drawn.load, *drawn.load_ink, *drawn.load_soft, *drawn.tint]
    assert {(pen.color, pen.bgcolor) for pen in every} == {(base.color, base.bgcolor)}
    assert not drawn.colours
    assert drawn.style["wrong"] != base and drawn.style["cursor"] != base


def test_shades_grow() -> None:
    assert len(SHADES) == LEVELS
    order = "·░▒▓█"
    assert [order.index(shade) for shade in SHADES] == sorted(order.index(s) for s in SHADES)


@pytest.mark.parametrize(
    ("app", "depth"),
    [
        ({"no_color": True, "console": SimpleNamespace(color_system="truecolor")}, "none"),
        ({"native_ansi_color": True}, "16"),
        ({"console": SimpleNamespace(color_system="truecolor")}, "truecolor"),
        ({"console": SimpleNamespace(color_system="256")}, "256"),
        ({"console": SimpleNamespace(color_system="standard")}, "16"),
        ({"console": SimpleNamespace(color_system=None)}, "none"),
        ({"colour_depth": "256", "no_color": True}, "256"),
    ],
)
def test_depth_of_the_terminal(app: dict[str, Any], depth: str) -> None:
    assert depth_of(SimpleNamespace(**app)) == depth


def test_bars() -> None:
    assert [sum_bar(value) for value in (0.0, 0.5, 1.0, 7.5)] == ["▁", "▄", "█", "█"]
    assert sum_bar(math.nan) == " "
    assert set(BARS) >= {sum_bar(step / 20) for step in range(21)}
    assert bar(0.5, 4) == "██  " and bar(1.0, 3) == "███" and bar(math.nan, 2) == "  "
    assert bar(0.3, 4).rstrip() == "█▏" or len(bar(0.3, 4)) == 4
    assert thin_bar(0.5, 5) == "━━╸  " and thin_bar(2.0, 3) == "━━━"
    assert [quantise(share) for share in (0.0, 0.124, 0.126, 0.99, 1.0, math.nan)] == [
        0,
        0,
        1,
        7,
        7,
        0,
    ]
