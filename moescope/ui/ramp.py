"""Colours and glyphs: how much a level, a mark or a sum looks like.

Load runs from blue to orange in equal steps of lightness, safe for common colour blindness;
what matters is never said by colour alone. Pens are built once per theme and colour depth, from the
theme's own background and foreground.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, isnan, radians, sin
from typing import TYPE_CHECKING, Literal

from rich.color import Color
from rich.style import Style

from moescope.ui.panels import LEVELS

if TYPE_CHECKING:
    from textual.widget import Widget

Depth = Literal["truecolor", "256", "16", "none"]
RGB = tuple[int, int, int]

SHADES = "·░░▒▒▓▓█"  # load without colour, one glyph a level
BARS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉█"
PICK, PICK_A, PICK_B, PICK_BOTH = "●", "a", "b", "●"
ROW_MARK, WRONG = "▸", "!"

# xterm's colour cube holds few blues and oranges of rising lightness: chosen by hand
RAMP_256_DARK = (24, 60, 102, 137, 173, 215, 222)
RAMP_256_LIGHT = (153, 146, 144, 173, 136, 130, 94)
FAINT = {"soft": 0.25, "dim": 0.42, "rule": 0.72}  # share of the panel's colour in the ink
PLAIN_PENS = ("text", "good", "bar")  # what no attribute sets apart without colour


@dataclass(frozen=True, slots=True, eq=False)
class Pens:
    """Every style that widgets draw with."""

    depth: Depth
    dark: bool
    style: dict[str, Style]
    ink: dict[str, Style]  # the same without a background, to lay over another style
    load: tuple[Style, ...]  # [LEVELS] on a background of the level's colour
    load_ink: tuple[Style, ...]  # [LEVELS] the level's colour as ink on the panel
    load_soft: tuple[Style, ...]  # [LEVELS] panel ink on a muted background: for dense glyphs
    tint: tuple[Style, ...]  # [LEVELS] a token's text
    ramp: tuple[Color | None, ...]  # [LEVELS]
    colours: bool  # levels can be told apart by colour; else `SHADES` stand for them


def pens_of(widget: Widget) -> Pens:
    """Pens for `widget` under the theme and the colour depth of its app."""
    app = widget.app
    variables = app.theme_variables
    base = widget.rich_style
    inks = tuple(
        _colour(variables.get(name))
        for name in ("primary", "accent", "success", "warning", "error")
    )
    return build(depth_of(app), app.current_theme.dark, base.color, base.bgcolor, *inks)


def depth_of(app: object) -> Depth:
    """The colours of the terminal; an app may fix them with an attribute `colour_depth`."""
    fixed = getattr(app, "colour_depth", None)
    if fixed in ("truecolor", "256", "16", "none"):
        return fixed  # type: ignore[no-any-return]
    if getattr(app, "no_color", False):
        return "none"
    if getattr(app, "native_ansi_color", False):
        return "16"
    system = getattr(getattr(app, "console", None), "color_system", None)
    names: dict[str | None, Depth] = {"truecolor": "truecolor", "256": "256", None: "none"}
    return names.get(system, "16")


def _colour(value: str | None) -> Color | None:
    from textual.color import Color as ThemeColor
    from textual.color import ColorParseError

    if not value:
        return None
    try:
        return ThemeColor.parse(value).rich_color
    except ColorParseError:
        return None


@lru_cache(maxsize=64)
def build(
    depth: Depth,
    dark: bool,
    ink: Color | None,
    paper: Color | None,
    primary: Color | None = None,
    accent: Color | None = None,
    good: Color | None = None,
    warn: Color | None = None,
    wrong: Color | None = None,
) -> Pens:
    """Pens from the panel's own colours and five colours of the theme."""
    if depth == "none":
        return _plain(dark, Style(color=ink, bgcolor=paper))
    base = Style(color=ink, bgcolor=paper)
    named = depth == "16"
    faint = {name: Style(dim=name != "soft") for name in FAINT}
    if not named:
        faint = {name: Style(color=_mix(ink, paper, share, dark)) for name, share in FAINT.items()}
    style = {
        "text": base,
        **{name: base + pen for name, pen in faint.items()},
        "strong": base + Style(bold=True),
        "accent": base + Style(color=accent or primary, bold=True),
        "good": base + Style(color=good),
        "warn": base + Style(color=warn, bold=True),
        "wrong": base + Style(color=wrong, bold=True),
        "bar": base + Style(color=primary),
        "cursor": base + Style(reverse=True, bold=True),
        "mark": base + Style(bold=True),
    }
    if named:
        return _sixteen(dark, base, style)
    ramp = _ramp(depth, dark, _rgb(paper, (0, 0, 0) if dark else (255, 255, 255)))
    style["bar"] = base + Style(color=ramp[5 if dark else 4])
    style |= {f"load{level}": base + Style(color=_seen(ramp, level)) for level in range(LEVELS)}
    load = tuple(Style(color=_readable(colour), bgcolor=colour, bold=True) for colour in ramp)
    back = _rgb(paper, (18, 18, 18) if dark else (255, 255, 255))
    ground = Color.from_rgb(*back)
    soft, softer = (
        (base, *(base + Style(bgcolor=_mix(colour, ground, share, dark)) for colour in ramp[1:]))
        for share in (0.35, 0.6)
    )
    bold = Style(bold=True)
    return Pens(
        depth=depth,
        dark=dark,
        style=style,
        ink=_inks(style),
        load=load,
        load_ink=tuple(base + Style(color=colour) for colour in ramp),
        load_soft=tuple(pen + bold for pen in soft),
        tint=softer,
        ramp=tuple(ramp),
        colours=True,
    )


def _plain(dark: bool, plain: Style) -> Pens:
    """No colour at all: weight, dimness and reverse video only."""
    faint, bold = plain + Style(dim=True), plain + Style(bold=True)
    style = dict.fromkeys(PLAIN_PENS, plain)
    style |= {"soft": plain} | dict.fromkeys(("dim", "rule"), faint)
    style |= dict.fromkeys(("strong", "accent", "warn", "wrong", "mark"), bold)
    style["cursor"] = plain + Style(reverse=True)
    style |= {f"load{level}": plain for level in range(LEVELS)}
    return Pens(
        depth="none",
        dark=dark,
        style=style,
        ink=_inks(style),
        load=(faint, faint, faint, plain, plain, plain, plain, plain),
        load_ink=(faint, faint, faint, plain, plain, plain, plain, plain),
        load_soft=(bold,) * LEVELS,
        tint=(faint, faint, plain, plain, plain, plain, bold, bold),
        ramp=(None,) * LEVELS,
        colours=False,
    )


def _sixteen(dark: bool, base: Style, style: dict[str, Style]) -> Pens:
    """Sixteen colours: shades for load, and blue to yellow by the terminal's own names."""
    names = (
        ("bright_black", "blue", "blue", "cyan", "cyan", "yellow", "bright_yellow", "bright_yellow")
        if dark
        else ("bright_black", "cyan", "cyan", "blue", "blue", "magenta", "red", "red")
    )
    inks = tuple(base + Style(color=Color.parse(name)) for name in names)
    bold = Style(bold=True)
    style = style | {"bar": inks[5]} | {f"load{level}": ink for level, ink in enumerate(inks)}
    return Pens(
        depth="16",
        dark=dark,
        style=style,
        ink=_inks(style),
        load=inks,
        load_ink=inks,
        load_soft=tuple(ink + bold for ink in inks),
        tint=(inks[0], inks[1], base, base, base, base + bold, inks[6] + bold, inks[7] + bold),
        ramp=tuple(ink.color for ink in inks),
        colours=False,
    )


def _inks(style: dict[str, Style]) -> dict[str, Style]:
    plain = style["text"]
    return {
        name: Style(
            color=None if pen.color == plain.color else pen.color, bold=pen.bold, dim=pen.dim
        )
        for name, pen in style.items()
    }


def sum_bar(value: float) -> str:
    """One glyph for a sum between 0 and 1; full above, blank where unknown."""
    if isnan(value):
        return " "
    return BARS[min(7, max(0, round(min(1.0, max(0.0, value)) * 8) - 1))]


def bar(share: float, width: int) -> str:
    """A horizontal bar of `width` cells, filled to `share` in eighths of a cell."""
    if isnan(share):
        return " " * width
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    text = "█" * full + (EIGHTHS[rest] if rest else "")
    return text + " " * (width - len(text))


def thin_bar(share: float, width: int) -> str:
    """The same as a line, in half cells: for bars on rows that touch."""
    halves = 0 if isnan(share) else round(min(1.0, max(0.0, share)) * width * 2)
    text = "━" * (halves // 2) + "╸" * (halves % 2)
    return text + " " * (width - len(text))


def quantise(share: float) -> int:
    """A share of 0..1 as a level of 0..LEVELS-1."""
    return min(LEVELS - 1, max(0, int(share * LEVELS))) if not isnan(share) else 0


# --- colour arithmetic: OKLab, where equal steps look equal -------------------------------------


def _ramp(depth: Depth, dark: bool, paper: RGB) -> list[Color]:
    """Level 0 a shade off the panel, then blue to orange, always further from the panel."""
    ground = _to_oklab(paper)
    rest = Color.from_rgb(*_from_oklab((ground[0] + (0.055 if dark else -0.03), *ground[1:])))
    if depth == "256":
        steps = [Color.from_ansi(code) for code in (RAMP_256_DARK if dark else RAMP_256_LIGHT)]
        return [_grey_before(steps[0], rest, dark), *steps]
    first = max(0.36, ground[0] + 0.13) if dark else min(0.82, ground[0] - 0.08)
    last = max(0.82, first + 0.30) if dark else min(0.53, first - 0.25)
    blue = _polar(first, 0.075, 250.0)
    orange = _polar(last, 0.145, 68.0 if dark else 55.0)
    colours = [rest]
    for level in range(LEVELS - 1):
        share = level / (LEVELS - 2)
        light, a, b = (x + (y - x) * share for x, y in zip(blue, orange, strict=True))
        colours.append(Color.from_rgb(*_from_oklab((light, a, b))))
    return colours


def _grey_before(first: Color, wanted: Color, dark: bool) -> Color:
    """The palette's grey nearest to `wanted` that is still nearer to the panel than `first`."""
    limit = lightness(first)
    greys = [Color.from_ansi(code) for code in range(232, 256)]
    before = [grey for grey in greys if (lightness(grey) < limit - 0.015) == dark]
    return min(before, key=lambda grey: abs(lightness(grey) - lightness(wanted)))


def _seen(ramp: list[Color], level: int) -> Color:
    """The colour of a level as thin ink: level 0 would hardly be seen on the panel."""
    return ramp[max(1, level)]


def _polar(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    return lightness, chroma * cos(radians(hue)), chroma * sin(radians(hue))


def _rgb(colour: Color | None, default: RGB) -> RGB:
    if colour is None or colour.is_default:
        return default
    triplet = colour.get_truecolor()
    return triplet.red, triplet.green, triplet.blue


def _mix(colour: Color | None, other: Color | None, share: float, dark: bool) -> Color:
    """`colour` with `share` of `other` in it."""
    light, black = (255, 255, 255), (0, 0, 0)
    one = _rgb(colour, light if dark else black)
    two = _rgb(other, black if dark else light)
    return Color.from_rgb(*(a + (b - a) * share for a, b in zip(one, two, strict=True)))


def _readable(colour: Color) -> Color:
    """Black or white, whichever stands out on `colour`."""
    return Color.from_rgb(*((16, 16, 16) if lightness(colour) > 0.62 else (255, 255, 255)))


def lightness(colour: Color) -> float:
    """Perceived lightness, 0 to 1 (OKLab)."""
    return _to_oklab(_rgb(colour, (0, 0, 0)))[0]


def _to_oklab(rgb: RGB) -> tuple[float, float, float]:
    """Björn Ottosson's OKLab, from 8-bit sRGB."""
    r, g, b = (_linear(value / 255) for value in rgb)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    medium = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _from_oklab(lab: tuple[float, float, float]) -> RGB:
    light, a, b = lab
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    channels = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (round(255 * min(1.0, max(0.0, _gamma(value)))) for value in channels)
    return red, green, blue


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _gamma(value: float) -> float:
    if value <= 0.0031308:
        return 12.92 * value
    return 1.055 * value ** (1 / 2.4) - 0.055  # type: ignore[no-any-return]
