"""The main screen on a recording: every key does its job, at every size, with hostile text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.segment import Segment
from textual.app import App, ComposeResult
from textual.filter import Monochrome
from textual.geometry import Region

from moescope.trace.memory import MemoryTrace
from moescope.ui.app import MoescopeApp
from moescope.ui.screens.main import MainScreen
from moescope.ui.screens.token import LayersTable, TokenScreen
from moescope.ui.text import cells, in_turn
from moescope.ui.watch import watch_source
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.layer_panel import LayerPanel
from moescope.ui.widgets.panel import Panel
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.token_panel import TokenPanel
from moescope.ui.widgets.transcript import Transcript
from moescope.ui.widgets.variant_bar import VariantBar
from tests.ui.piloted import replaying, text_of, wait_for
from tests.ui.recorded import frames_of, meta_of, recorded


async def test_the_first_screen_says_what_is_open_and_where():
    async with replaying() as (main, _):
        status = text_of(main.query_one(StatusLine))
        assert "tiny-olmoe" in status and "6L×16E top-4" in status and "51/80" in status
        assert main.query_one(ExpertMap).data is not None
        assert "trained" in text_of(main.query_one(VariantBar))
        assert "never renormalised" in text_of(main.query_one(Transcript)).replace("\n", " ")
        assert "token 50" in str(main.query_one(TokenPanel).border_title)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["down", "j"], (2, 0, 50)),
        (["down", "down", "k"], (1, 0, 50)),
        (["shift+right", "shift+right", "shift+left"], (0, 1, 50)),
        (["shift+left"], (0, 15, 50)),
        (["right_square_bracket"], (0, 0, 51)),
        (["left_square_bracket", "comma"], (0, 0, 48)),
        (["full_stop"], (0, 0, 51)),
        (["home"], (0, 0, 0)),
        (["end"], (0, 0, 79)),
    ],
)
async def test_keys_move_the_cursor(keys, expected):
    async with replaying() as (main, pilot):
        await pilot.press(*keys)
        assert (main.look.router, main.look.expert, main.look.at) == expected
        data = main.query_one(ExpertMap).data
        assert data is not None and data.cursor == expected[:2]


async def test_left_and_right_go_to_picked_experts_only():
    async with replaying() as (main, pilot):
        lane = main.look.lane
        picked = sorted(lane.expert_ids[50, 0].tolist())
        seen = []
        for _ in range(5):
            await pilot.press("l")
            seen.append(main.look.expert)
        assert seen[:4] == [e for e in picked if e > 0] + [e for e in picked if e <= 0] or set(
            seen
        ) == set(picked)
        await pilot.press("h")
        assert main.look.expert == seen[-2]


async def test_changes_are_where_the_first_expert_changed():
    async with replaying() as (main, pilot):
        await pilot.press("right_curly_bracket")
        first, row = main.look.lane.expert_ids[:, 0, 0], main.look.at
        assert row > 50 and first[row] != first[row - 1]
        assert (first[51:row] == first[50]).all()
        await pilot.press("left_curly_bracket")
        assert main.look.at <= 50


@pytest.mark.parametrize(
    ("text", "router", "expert", "row"),
    [("L3E7", 3, 7, 50), ("@12", 0, 0, 12), ("nothing CRASHED", 0, 0, 46)],
)
async def test_find_goes_to_addresses_and_text(text, router, expert, row):
    async with replaying() as (main, pilot):
        await pilot.press("slash", *text.replace(" ", "_"))
        main.app.screen.query_one("Input").value = text
        await pilot.press("enter")
        assert main.app.screen is main
        at = main.look.at
        assert (main.look.router, main.look.expert) == (router, expert)
        assert at == row or main.look.lane.texts[at].strip() == "Nothing"


async def test_find_says_what_is_not_there_and_stays_open():
    async with replaying() as (main, pilot):
        await pilot.press("slash", *"L99", "enter")
        assert main.app.screen is not main
        assert "L00 to L05" in str(main.app.screen.query_one(".wrong").render())
        await pilot.press("escape")
        assert main.app.screen is main and main.look.at == 50


async def test_hits_are_walked_with_n():
    async with replaying(row=0) as (main, pilot):
        await pilot.press("slash", *"the", "enter")
        first = main.look.at
        await pilot.press("n")
        second = main.look.at
        assert "the" in main.look.lane.texts[first] and second > first
        await pilot.press("N")
        assert main.look.at == first


async def test_a_variant_on_the_same_logits_is_shown_at_once_and_left_again():
    async with replaying() as (main, pilot):
        before = main.query_one(ExpertMap).data
        await pilot.press("v")
        data = main.query_one(ExpertMap).data
        assert main.look.shown == "softmax_over_selected"
        assert data is not before and np.allclose(data.score_sum, 1) and data.sum_wrong.all()
        layer = main.query_one("#layer", LayerPanel).data
        assert "on the same logits: softmax_over_selected" in layer.basis and layer.sum_wrong
        for _ in range(len(main.subject.variants) - 1):
            await pilot.press("v")
        assert main.look.shown is None
        await pilot.press("V", "escape")
        assert main.look.shown is None
        assert main.query_one(ExpertMap).data.score_sum.tolist() == before.score_sum.tolist()


async def test_without_logits_variants_say_so():
    trace = MemoryTrace(replace(meta_of(), record="weights"))
    for frame in frames_of(trace.meta, 60, logits=False):
        trace.append(frame)
    async with replaying(trace) as (main, pilot):
        await pilot.press("v")
        layer = main.query_one("#layer", LayerPanel).data
        assert "not recorded" in layer.basis and layer.rows == ()


async def test_a_free_expression_joins_the_bar_and_a_wrong_one_says_why():
    async with replaying() as (main, pilot):
        await pilot.press("plus", *"norm_topk_prob", "enter")
        assert "value" in str(main.app.screen.query_one(".wrong").render())
        main.app.screen.query_one("Input").value = "num_experts_per_tok=2@1-3"
        await pilot.press("enter")
        assert main.app.screen is main
        assert main.look.shown == "num_experts_per_tok=2@1-3"
        counts = (main.look.decision().expert_ids >= 0).sum(axis=1)
        assert counts.tolist() == [4, 2, 2, 2, 4, 4]


async def test_tints_zooms_and_panels():
    async with replaying() as (main, pilot):
        await pilot.press("t")
        assert "margin" in main.query_one(Transcript).data.title
        zoom = main.query_one(ExpertMap).zoom
        await pilot.press("Z")
        assert main.query_one(ExpertMap).zoom != zoom
        await pilot.press("z", "z")
        for key, name in (("2", "layer"), ("3", "sums"), ("4", "token"), ("1", "map")):
            await pilot.press(key)
            assert not main.query_one(f"#{name}").display
            await pilot.press(key)
            assert main.query_one(f"#{name}").display


async def test_jump_makes_a_panel_as_large_as_the_screen():
    async with replaying() as (main, pilot):
        await pilot.press("ctrl+o", "a")
        assert main.maximized is main.query_one("#map")
        await pilot.press("escape")
        assert main.maximized is None


async def test_a_replay_plays_by_its_clock_and_pauses():
    async with replaying(row=10) as (main, pilot):
        time = [0.0]
        main.now = lambda: time[0]
        await pilot.press("space")
        assert main.playing
        main.tick()
        time[0] += 0.5
        main.tick()
        assert main.look.at == 14  # 8 tokens a second
        await pilot.press("greater_than_sign")
        main.tick()
        time[0] += 0.5
        main.tick()
        assert main.look.at == 22
        await pilot.press("space")
        time[0] += 5
        main.tick()
        assert main.look.at == 22 and not main.playing


async def test_a_replay_ends_at_the_last_token_and_starts_over():
    async with replaying(row=78) as (main, pilot):
        time = [0.0]
        main.now = lambda: time[0]
        await pilot.press("space")
        for _ in range(4):
            time[0] += 0.5
            main.tick()
        assert main.look.at == 79 and not main.playing
        await pilot.press("space")
        assert main.look.at == 0 and main.playing


async def test_go_to_and_bookmarks():
    async with replaying() as (main, pilot):
        await pilot.press("m", "g", *"12", "enter")
        assert main.look.at == 12 and main.look.marks == {50}
        await pilot.press("g", *"900", "enter")
        assert main.app.screen is not main


async def test_the_drill_down_sorts_filters_and_copies():
    async with replaying() as (main, pilot):
        await pilot.press("enter")
        screen = main.app.screen
        assert isinstance(screen, TokenScreen)
        table = screen.query_one(LayersTable)
        assert [row.router for row in table.data.rows] == list(range(6))
        await pilot.press("s")
        margins = [row.margin for row in table.data.rows]
        assert margins == sorted(margins)
        await pilot.press("n")
        assert all(row.near_tie for row in table.data.rows)
        await pilot.press("n", "right_square_bracket", "v")
        assert main.look.at == 51
        await pilot.press("y")
        import json

        copied = json.loads(main.app.clipboard)
        assert copied["position"] == 51 and len(copied["layers"]) == 6
        assert copied["basis"].startswith("on the same logits")
        await pilot.press("escape")
        assert main.app.screen is main


async def test_a_recording_has_no_prompt_and_says_so_in_its_footer():
    async with replaying() as (main, pilot):
        assert not main.query_one("#ask").display and main.query_one("#transport").display
        assert main.check_action("prompt", ()) is False
        await pilot.press("i", "A", "r")
        assert main.focused is None and main.look.at == 50


async def test_q_says_how_to_quit_and_ctrl_q_does():
    async with replaying() as (main, pilot):
        await pilot.press("q")
        await wait_for(pilot, lambda: any("ctrl+q" in n.message for n in main.app._notifications))
        await pilot.press("ctrl+q")
        await wait_for(pilot, lambda: main.app._exit)
        assert main.app.return_code == 0


async def test_help_lists_the_keys():
    async with replaying() as (main, pilot):
        await pilot.press("question_mark")
        await wait_for(pilot, lambda: bool(main.query("HelpPanel")))
        await pilot.press("question_mark")
        await wait_for(pilot, lambda: not main.query("HelpPanel"))
        await pilot.press("f1")
        await wait_for(pilot, lambda: bool(main.query("HelpPanel")))
        await pilot.press("escape")
        await wait_for(pilot, lambda: not main.query("HelpPanel"))


async def test_the_palette_reaches_every_action():
    async with replaying() as (main, _):
        titles = {command.title for command in main.app.get_system_commands(main)}
        assert {"Compare", "Find", "Open", "Tint", "Export", "Help", "Theme"} <= titles
        assert "Generate with A" not in titles  # a recording cannot


@pytest.mark.parametrize("size", [(80, 24), (60, 16), (103, 30), (104, 24), (120, 40), (200, 60)])
async def test_every_size_shows_map_text_and_status(size):
    async with replaying(size=size) as (main, _):
        for name in ("#status", "#map", "#text", "#variants"):
            region = main.query_one(name).region
            assert region.width > 20 and region.height > 0
            assert region.right <= size[0] and region.bottom <= size[1]
        assert main.query_one("#text").size.height >= 3


async def test_resize_storm():
    async with replaying() as (main, pilot):
        for width, height in [(59, 40), (1, 1), (200, 60), (60, 15), (60, 16), (300, 5), (80, 24)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            small = main.has_class("-too-small")
            assert small == (width < 60 or height < 16)
        assert f"needs {60}×{16}" in str(main.query_one("#small").render())
        assert main.query_one("#map").region.height > 0


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "size"),
    [(48, 128, 8, (120, 40)), (48, 128, 8, (200, 60)), (61, 256, 8, (80, 24)), (1, 2, 1, (80, 24))],
)
async def test_models_of_every_shape(layers, experts, top_k, size):
    trace = recorded(20, layers=layers, experts=experts, top_k=top_k)
    async with replaying(trace, size=size, row=10) as (main, pilot):
        await pilot.press("v", "j", "l", "enter", "escape")
        region = main.query_one("#map").region
        assert region.bottom <= size[1] and region.height > 0
        assert main.query_one("#text").region.height > 0


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x9b2J",
    "[bold]x[/bold]",
    "\u202egnp",
    "\r\n",
    "\x00",
    "\U000e0041",
]


async def test_hostile_text_never_reaches_the_terminal():
    meta = meta_of(name="\x1b]0;owned\x07[red]name")
    trace = MemoryTrace(meta)
    for frame in frames_of(meta, 60, words=HOSTILE):
        trace.append(frame)
    app = MoescopeApp(watch_source(meta, trace, "\x1b[2J"))
    async with app.run_test(size=(120, 40)) as pilot:
        main = app.main
        main.playing = False
        for row in range(0, 60, 7):
            main.look.seek(row)
            main.draw()
            main.say(HOSTILE[row % len(HOSTILE)])
            await pilot.pause()
            for strip in main._compositor.render_strips():
                for segment in strip:
                    bad = [c for c in segment.text if ord(c) < 32 or 127 <= ord(c) < 160]
                    assert not bad and "\u202e" not in segment.text


async def test_what_stays_is_neither_filtered_nor_drawn_again() -> None:
    """With every token: lines that did not change keep what filters made of them, and a new title
    draws the edge it stands in, nothing else."""
    async with replaying(row=50) as (main, pilot):
        assert main.app.get_line_filters()[0] is main.app.get_line_filters()[0]
        for panel in main.query(Panel):
            assert panel.get_line_filters()[0] is panel.get_line_filters()[0]
        token = main.query_one(TokenPanel)
        assert token.data is not None
        whole = token.size.region
        before = token.render_lines(token.region.size.region)
        token.show(replace(token.data, title="token 51 of another name"))
        assert token._repaint_regions == {Region(1, 0, whole.width, 1)}
        await pilot.pause()
        after = token.render_lines(token.region.size.region)
        assert "another name" in after[0].text and len(after) == whole.height + 2
        assert all(a is b for a, b in zip(before[1:], after[1:], strict=True))


def drawn(main: MainScreen) -> dict[str, list[list[Segment]]]:
    """Every panel that is shown, as it would be written now."""
    panels = [panel for panel in main.query(Panel) if panel.size.height]
    assert len(panels) > 5
    return {
        str(panel.id): [strip._segments for strip in panel.render_lines(panel.outer_size.region)]
        for panel in panels
    }


def anew(main: MainScreen) -> None:
    """Forget every line, and what filters made of it."""
    in_turn.cache_clear()
    for panel in main.query(Panel):
        panel._strips.clear()
        panel._styles_cache.clear()


async def test_lines_that_stay_are_what_filtering_anew_would_give() -> None:
    """Along tokens, and after what changes filters or colours: a theme, and no colour at all."""
    async with replaying(row=50) as (main, pilot):
        app = main.app
        before: dict[str, list[list[Segment]]] = {}
        steps = (
            *(lambda: main.look.move_token(1), lambda: main.look.move_router(1)),
            *(lambda: setattr(app, "theme", "textual-light"), lambda: main.look.move_token(-3)),
            *(lambda: app._filters.append(Monochrome()), lambda: main.look.move_token(2)),
            lambda: setattr(app, "theme", "textual-dark"),
        )
        for number, step in enumerate(steps):
            step()
            main.draw()
            await pilot.pause()
            app.screen.refresh(layout=number == 4)  # what a change of filters asks for
            await pilot.pause()
            kept = drawn(main)
            anew(main)
            assert drawn(main) == kept != before, number
            before = kept


@pytest.mark.parametrize("width", range(2, 13))
async def test_a_title_that_changes_stands_as_if_it_had_always_been_there(width: int) -> None:
    names = [
        ("layers", "7 tokens"),
        ("a long title", ""),
        ("", "note"),
        ("ab", "c"),
        ("宽宽宽", ""),
    ]

    class Titled(Panel[tuple[str, str]]):
        def labels(self, data: tuple[str, str]) -> tuple[str, str]:
            return data

    class Bare(App[None]):
        def compose(self) -> ComposeResult:
            yield Titled(id="first")

    def edge(panel: Titled) -> str:
        (strip,) = panel.render_lines(Region(0, 0, width, 1))
        assert strip.cell_length == width
        return strip.text

    async with Bare().run_test(size=(width, 4)) as pilot:
        panel = pilot.app.query_one(Titled)
        for name in names:
            panel.show(name)
            await pilot.pause()
            changed = edge(panel)
            panel.display = False
            fresh = Titled()
            await pilot.app.mount(fresh)
            fresh.show(name)
            await wait_for(pilot, lambda fresh=fresh: fresh.outer_size.width == width)
            await pilot.pause()
            assert edge(fresh) == changed
            await fresh.remove()
            panel.display = True
            await pilot.pause()
            needed = 6 + sum(map(cells, name)) + (3 if name[1] else 0)
            assert all(part in changed for part in name) or width < needed
