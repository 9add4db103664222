"""Every panel as text: what it says, at which sizes, and that foreign text stays text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from textual.content import Content

from moescope.safety import escape_char
from moescope.ui.panels import (
    AgreementData,
    AgreementRow,
    ExpertRow,
    LayerData,
    LoadingData,
    PlotData,
    StatusData,
    TokenData,
    TransportData,
    VariantBarData,
    VariantItem,
)
from moescope.ui.text import ControlFilter, cells
from moescope.ui.widgets.agreement_panel import AgreementPanel
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.layer_line import LayerLine
from moescope.ui.widgets.layer_panel import LayerPanel
from moescope.ui.widgets.loading_panel import LoadingPanel, amount
from moescope.ui.widgets.score_plot import ScorePlot, limits, runs
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.token_panel import TokenPanel
from moescope.ui.widgets.transcript import Transcript
from moescope.ui.widgets.transport import Transport
from moescope.ui.widgets.variant_bar import VariantBar
from tests.ui.drawing import lines, map_data, staged, transcript, watch_refresh

LAYER = LayerData(
    title="layer 17",
    router="softmax → top-3, not renormalised",
    rows=(
        ExpertRow(1, 62, 0.156, 0.214, 0.96),
        ExpertRow(2, 96, 0.119, 0.163, 0.5),
        ExpertRow(3, 4, None, 0.131, 0.0),
    ),
    runner_up=ExpertRow(0, 118, 0.058, None, 0.2),
    margin=0.001,
    margin_unit="score",
    near_tie=True,
    score_sum=0.731,
    sum_range=(0.58, 0.84),
    sum_expected="below 1 by the spec",
    sum_wrong=False,
    mass=0.731,
    entropy=2.71,
    load_cv=0.41,
    dead=3,
    window=64,
    basis="as generated",
)
TOKEN = TokenData(
    title="token 412 “ a”",
    token_id=264,
    probability=0.42,
    rank=1,
    alternatives=((" the", 0.21), (" low", 0.09)),
    shared_with_previous=(214, 384),
    near_ties=(9, 48),
    near_tie_below=0.01,
    new_experts=2,
    variants=("same logits under B: same ids, Σ 1.000",),
)
BAR = VariantBarData(
    (
        VariantItem("A", "trained  softmax → top-8, not renormalised", "generating", shown=True),
        VariantItem("B", "softmax over selected", "same_logits"),
        VariantItem("C", "always renormalised", "same_logits", "B"),
    )
)
STATUS = StatusData(
    name="OLMoE-1B-7B",
    shape="16L×64E top-8",
    backend="cpu float32 torch",
    mode="running",
    rate="31.4 tok/s",
    position="412/2048",
    memory="17.2 GB",
    cursor="L17 E062 @412",
    frames_per_second="15 Hz",
)
LOADING = LoadingData("reading weights", "model-00001.safetensors", 500, 1000, ("a note",))
AGREEMENT = AgreementData(
    "agreement", (AgreementRow("same top-8", "17/48", "0.41"),), "same argmax until 41."
)
POSITIONS = np.arange(100, 164)
PLOT = PlotData(
    "Σ score sum",
    POSITIONS,
    (("Σ", (0.6 + 0.2 * np.sin(POSITIONS / 5)).astype(np.float32)),),
    guide=1.0,
    cursor=130,
)
EVERY: list[tuple[type[Any], Any]] = [
    (LayerPanel, LAYER),
    (LayerLine, LAYER),
    (TokenPanel, TOKEN),
    (VariantBar, BAR),
    (StatusLine, STATUS),
    (LoadingPanel, LOADING),
    (AgreementPanel, AGREEMENT),
    (ScorePlot, PLOT),
    (Transport, TransportData(412, 2048, True, 1.0)),
    (ExpertMap, map_data(6, 16, 2)),
    (Transcript, transcript(["a", " b"])),
]
HOSTILE = "[red]\x1b[31m\x9b2J\u202e[/nope]\u200b\U000e0041\n\t[@click=quit]x[/] 日本\x07"


async def shown(kind: type[Any], data: Any, size: tuple[int, int], **how: Any) -> list[str]:
    widget = kind()
    async with staged(widget, data, size, **how):
        return lines(widget)


@pytest.mark.parametrize(("kind", "data"), EVERY, ids=lambda item: getattr(item, "__name__", ""))
async def test_every_size_is_filled_exactly(kind: type[Any], data: Any) -> None:
    widget = kind()
    async with staged(widget, data, (80, 24)) as pilot:
        for size in ((200, 60), (120, 40), (80, 24), (40, 6), (12, 2), (3, 1), (1, 1)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert {cells(line) for line in lines(widget)} == {widget.size.width}


@pytest.mark.parametrize(("kind", "data"), EVERY, ids=lambda item: getattr(item, "__name__", ""))
async def test_the_same_data_again_refreshes_nothing(kind: type[Any], data: Any) -> None:
    widget = kind()
    async with staged(widget, data, (100, 30)):
        seen = watch_refresh(widget)
        widget.show(replace(data))
        assert seen == []


@pytest.mark.parametrize(
    ("colours", "theme"),
    [
        ("truecolor", "textual-light"),
        ("256", "nord"),
        ("16", "ansi-dark"),
        ("none", "textual-dark"),
    ],
)
async def test_every_panel_draws_in_every_theme_and_depth(colours: str, theme: str) -> None:
    for kind, data in EVERY:
        for line in await shown(kind, data, (80, 12), colours=colours, theme=theme):
            assert cells(line) == 80


def hostile(data: Any) -> Any:
    """The data with every text in it replaced."""
    if isinstance(data, str):
        return data if data in KEPT else HOSTILE + data[:1]
    if isinstance(data, tuple):
        return tuple(hostile(item) for item in data)
    if hasattr(data, "__dataclass_fields__"):
        return replace(
            data, **{name: hostile(getattr(data, name)) for name in data.__dataclass_fields__}
        )
    return data


KEPT = ("running", "generating", "same_logits", "text", "A", "B", "C")


@pytest.mark.parametrize(("kind", "data"), EVERY, ids=lambda item: getattr(item, "__name__", ""))
async def test_hostile_text_stays_text(kind: type[Any], data: Any) -> None:
    widget = kind()
    gate = ControlFilter()
    async with staged(widget, hostile(data), (90, 20)) as pilot:
        widget.styles.border = ("round", "white")
        await pilot.pause()
        widget.show(hostile(replace(data)))
        await pilot.pause()
        for strip in widget.render_lines(widget.size.region):
            sent = "".join(
                part.text for part in gate.apply(list(strip), widget.background_colors[1])
            )
            assert all(escape_char(char) == char and char != "\n" for char in sent)
        assert isinstance(widget._border_title, Content | None)
        pilot.app.export_screenshot()


async def test_the_layer_panel_names_the_one_not_chosen_and_both_sums() -> None:
    rows = await shown(LayerPanel, LAYER, (75, 16))
    text = "\n".join(rows)
    assert "E062   0.156   0.214" in rows[1]
    assert " ─" in rows[3] and "0.131" in rows[3]  # a score that was not recorded
    assert rows[4].split()[:3] == ["4", "E118", "0.058"] and "near tie" in rows[4]
    assert "Δ 0.001 score to #3" in rows[4]
    assert "Σ 0.731" in text and "mass 0.731" in text and "entropy 2.71 nats" in text
    assert "p10 0.58 p90 0.84" in text and "load CV 0.41" in text and "dead 3" in text
    assert "as generated" in text and "below 1 by the spec" in text and "!" not in text


async def test_a_wrong_sum_is_marked_by_a_character() -> None:
    wrong = replace(LAYER, sum_wrong=True, sum_expected="1 by the spec")
    for colours in ("truecolor", "none"):
        assert "Σ 0.731 !" in "\n".join(await shown(LayerPanel, wrong, (75, 16), colours=colours))
        assert "Σ 0.731!" in "\n".join(await shown(LayerLine, wrong, (80, 1), colours=colours))


async def test_a_layer_panel_too_low_says_how_many_it_leaves_out() -> None:
    many = replace(LAYER, rows=tuple(ExpertRow(n, n, 0.1, 0.1, 0.5) for n in range(1, 31)))
    rows = await shown(LayerPanel, many, (75, 14))
    listed = [row for row in rows if row.strip()[:2].strip().isdigit()]
    assert any("more" in row for row in rows)
    assert len(rows) == 14 and "as generated" in rows[-1]
    assert any("E118" in row for row in listed)


async def test_the_layer_line_shows_what_its_sum_is_of() -> None:
    (line,) = await shown(LayerLine, LAYER, (80, 1))
    assert "E062 .21 E096 .16 E004 .13" in line and "Δ 0.001 score" in line
    unweighed = replace(LAYER, rows=tuple(replace(row, weight=None) for row in LAYER.rows))
    (line,) = await shown(LayerLine, unweighed, (80, 1))
    assert "scores E062 .16 E096 .12" in line


async def test_the_layer_line_keeps_the_sum_when_it_drops_experts() -> None:
    many = replace(LAYER, rows=tuple(ExpertRow(n, n, 0.1, 0.1, 0.5) for n in range(1, 31)))
    (line,) = await shown(LayerLine, many, (80, 1))
    assert "…" in line and "Σ 0.731" in line and "tie" in line


async def test_the_token_panel() -> None:
    text = "\n".join(await shown(TokenPanel, TOKEN, (43, 14)))
    for words in (
        "id 264",
        "p 0.420",
        "rank 1",
        "“ the”",
        "214/384",
        "9/48",
        "within 1 %",
        "Σ 1.000",
    ):
        assert words in text
    unknown = replace(TOKEN, probability=None, rank=None, alternatives=(), near_ties=None)
    text = "\n".join(await shown(TokenPanel, unknown, (43, 14)))
    assert "p ─" in text and "rank ─" in text and "near tie" not in text


async def test_the_variant_bar_names_equals_and_gives_way() -> None:
    (wide,) = await shown(VariantBar, BAR, (160, 1))
    assert "A● trained" in wide and "B○ softmax over selected" in wide and "≡ B" in wide
    for width in (80, 60, 45):
        (narrow,) = await shown(VariantBar, BAR, (width, 1))
        assert all(mark in narrow for mark in ("A●", "B○", "C○", "≡ B"))


async def test_a_click_picks_a_variant() -> None:
    widget = VariantBar()
    async with staged(widget, BAR, (80, 1)) as pilot:
        column = lines(widget)[0].index("C○")
        await pilot.click(VariantBar, offset=(column, 0))
        await pilot.pause()
        heard = pilot.app.heard  # type: ignore[attr-defined]
    assert [each.letter for each in heard if isinstance(each, VariantBar.Picked)] == ["C"]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
async def test_the_status_line_drops_parts_whole(width: int) -> None:
    (line,) = await shown(StatusLine, STATUS, (width, 1))
    assert STATUS.name in line and STATUS.rate in line and "●" in line
    assert "…" not in line
    assert line.rstrip().endswith(("15 Hz", "@412", "GB", "2048", "tok/s"))
    if width >= 120:
        assert all(part in line for part in (STATUS.backend, STATUS.memory, STATUS.cursor))


@pytest.mark.parametrize(
    ("mode", "glyph"), [("paused", "‖"), ("replay", "▶"), ("failed", "✗"), ("prefill", "◐")]
)
async def test_modes_read_without_colour(mode: Any, glyph: str) -> None:
    (line,) = await shown(StatusLine, replace(STATUS, mode=mode), (120, 1), colours="none")
    assert glyph in line


async def test_the_transport_scrubs() -> None:
    widget = Transport()
    async with staged(widget, TransportData(0, 101, False, 1.0), (80, 1)) as pilot:
        line = lines(widget)[0]
        left, right = line.index("─"), line.rindex("─")
        for x in (left, (left + right) // 2, right):
            await pilot.click(Transport, offset=(x, 0))
        await pilot.pause()
        heard = pilot.app.heard  # type: ignore[attr-defined]
    sought = [each.position for each in heard if isinstance(each, Transport.Sought)]
    assert sought[0] == 0 and sought[2] == 100 and abs(sought[1] - 50) <= 1


async def test_loading_shows_bytes_and_notes() -> None:
    text = "\n".join(await shown(LoadingPanel, LOADING, (60, 10)))
    assert "500 B of 1000 B" in text or "500 B of 1 kB" in text
    assert "50%" in text and "! a note" in text
    unknown = replace(LOADING, total=0)
    assert "%" not in "\n".join(await shown(LoadingPanel, unknown, (60, 10)))


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (17_200_000_000, "17.2 GB"), (2_500_000, "2.5 MB")],
)
def test_amounts(size: int, words: str) -> None:
    assert amount(size) == words


async def test_agreement_lines_up() -> None:
    rows = await shown(AgreementPanel, AGREEMENT, (43, 10))
    assert rows[0].rstrip().endswith("run") and rows[1].rstrip().endswith("0.41")
    assert rows[0].index("this token") + 10 == rows[1].index("17/48") + 5
    assert "same argmax until 41." in "\n".join(rows)


async def test_the_plot_has_its_line_guide_cursor_and_ends() -> None:
    rows = await shown(ScorePlot, PLOT, (75, 7))
    text = "\n".join(rows)
    assert any("⠀" < char <= "⣿" for char in text)
    assert "1.00┤" in rows[0] and "┄" in rows[0] and "│" in text
    assert rows[-1].split() == ["100", "163"]


async def test_a_plot_of_two_lanes_names_both_and_leaves_gaps() -> None:
    gap = np.full(64, np.nan, np.float32)
    gap[:20] = 0.2
    two = replace(PLOT, series=(("A", PLOT.series[0][1]), ("B", gap)), guide=None, cursor=None)
    rows = await shown(ScorePlot, two, (120, 9))
    assert sum(row.rstrip().endswith("A") for row in rows) == 1
    assert sum(row.rstrip().endswith("B") for row in rows) == 1
    assert "".join(rows[-2])[60:100].strip("│┤ ⠀") == ""
    nothing = replace(PLOT, series=(("Σ", np.full(64, np.nan, np.float32)),))
    assert (await shown(ScorePlot, nothing, (75, 7)))[0].startswith(ScorePlot.EMPTY)


async def test_a_plot_reaches_both_edges_at_any_width() -> None:
    flat = replace(PLOT, series=(("Σ", np.full(64, 0.5, np.float32)),), guide=None, cursor=None)
    for width in (40, 100, 200):
        rows = await shown(ScorePlot, flat, (width, 7))
        drawn = [x for row in rows for x, char in enumerate(row) if "⠀" < char <= "⣿"]
        assert min(drawn) <= 7 and max(drawn) >= width - 8


def test_axes_have_round_ends() -> None:
    for values, guide in (
        ([0.41, 0.77], 1.0),
        ([0.0, 0.0], None),
        ([1e-4, 3e-4], None),
        ([5, 900], 1),
    ):
        low, high = limits([np.array(values, np.float32)], guide)
        assert low <= min(values) + 1e-9 and high >= max(values) - 1e-6 and low < high
    assert limits([np.array([0.41, 0.77], np.float32)], 1.0) == pytest.approx((0.4, 1.0))


async def test_an_axis_ends_where_no_value_can_be() -> None:
    shares = np.array([0.0, 0.3, 1.0, 0.2], np.float32)
    data = PlotData("share", np.arange(4), (("differ", shares),))
    assert (await shown(ScorePlot, data, (60, 8)))[0].startswith("1.20")
    bound = replace(data, bounds=(0.0, 1.0))
    rows = await shown(ScorePlot, bound, (60, 8))
    assert rows[0].startswith("1.00") and "⠁" <= max(rows[0]) <= "⣿"


def test_thinning_keeps_extremes() -> None:
    values = np.zeros(4000, np.float32)
    values[1234] = 9.0
    ((_, ys),) = runs(np.arange(4000), values, 140)
    assert max(ys) == 9.0 and len(ys) <= 2 * 140
