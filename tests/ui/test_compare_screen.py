"""Two lanes side by side: on recordings of lanes that part, and from a run with one lane."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from textual.widgets import Input, Static

from moescope.engine import protocol as p
from moescope.engine.link import Scripted
from moescope.trace.frames import TraceEvent
from moescope.trace.memory import MemoryTrace
from moescope.ui import compare_layers, compare_view, routers
from moescope.ui.compare_layers import LaneItem, LanesData
from moescope.ui.compare_view import Pair
from moescope.ui.flips import Flips
from moescope.ui.history import History
from moescope.ui.screens.compare import CompareScreen
from moescope.ui.view import Cursor
from moescope.ui.watch import Watch
from moescope.ui.widgets.agreement_panel import AgreementPanel
from moescope.ui.widgets.compare_panels import GatePanel, LanesBar, LayersPanel, entries, fitting
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.score_plot import ScorePlot
from moescope.ui.widgets.transcript import Transcript
from tests.ui.piloted import FACTS, Engine, replaying, running, text_of, wait_for
from tests.ui.recorded import STORY, frames_of, meta_of

PART = 30


def parting(tokens: int = 60, **options: object) -> MemoryTrace:
    """Lane 1 runs softmax over the selected, and says something else from token 30 on."""
    meta = meta_of(**options)  # type: ignore[arg-type]
    trace = MemoryTrace(meta)
    name = "softmax_over_selected"
    lane_a = frames_of(meta, tokens)
    lane_b = frames_of(meta, tokens, lane=1, variant=name)[:PART]
    lane_b += frames_of(meta, tokens, lane=1, variant=name, words=STORY[::-1], seed=2)[PART:]
    for a, b in zip(lane_a, lane_b, strict=True):
        trace.append(a)
        trace.append(b)
    return trace


def pair_of(trace: MemoryTrace) -> Pair:
    history = History(trace.meta, trace)
    history.pull()
    a, b = history.lane(0), history.lane(1)
    assert a is not None and b is not None
    pair = Pair(routers.table_of(trace.meta), a, b)
    assert pair.feed() and not pair.feed()
    return pair


def test_the_map_shows_what_only_one_lane_chose():
    pair = pair_of(parting())
    data = compare_view.difference_map(pair, 40, "xor", Cursor())
    for router in range(6):
        a, b = (set(lane.expert_ids[40, router].tolist()) for lane in (pair.a, pair.b))
        assert set(np.flatnonzero(data.marks[router] == 1)) == a - b
        assert set(np.flatnonzero(data.marks[router] == 2)) == b - a
        assert data.right is not None and data.right[router] == f"{len(a - b)}/4"
    assert not compare_view.difference_map(pair, 20, "xor", Cursor()).marks.any()
    assert (compare_view.difference_map(pair, 40, "right", Cursor()).marks == 2).sum() == 24


def test_the_map_and_the_table_count_alike_where_one_lane_picks_more():
    meta = meta_of()
    trace = MemoryTrace(meta)
    more = "num_experts_per_tok=5"
    lanes = frames_of(meta, 8), frames_of(meta, 8, lane=1, variant=more)
    for frames in zip(*lanes, strict=True):
        for frame in frames:
            trace.append(frame)
    pair = pair_of(trace)
    data = compare_view.difference_map(pair, 5, "right", Cursor())
    table = compare_layers.layers_data(pair, 5, 0, {}).rows
    assert data.right == tuple(f"{row.differ}/{row.of}" for row in table) == ("1/4",) * 6
    headings = [
        compare_view.difference_map(pair, 5, mode, Cursor()).heading
        for mode in ("xor", "left", "right")
    ]
    assert headings == ["differ", "A alone", "B alone"]


def test_the_numbers_keep_the_common_text_and_the_rest_apart():
    pair = pair_of(parting())
    data = compare_view.agreement(pair, 20)
    rows = {row.label: row for row in data.rows}
    assert rows["same top-4 set"].this_token == "6/6" and rows["same top-4 set"].run == "1.00"
    assert rows["Σ  A / B"].this_token.endswith("/1.00")
    assert float(rows["overlap after the split"].run) < 4
    assert "before token 30" in data.verdict and "free text" in data.title


def test_divergence_is_zero_until_the_texts_part():
    pair = pair_of(parting())
    (series,) = compare_view.divergence(pair, 10).series
    assert (series[1][:PART] == 0).all() and (series[1][PART:] > 0).mean() > 0.9
    assert compare_view.next_difference(pair, 3, 1) == PART
    assert compare_view.next_difference(pair, PART, -1) is None


async def test_a_recording_of_two_lanes_opens_side_by_side():
    async with replaying(parting(), row=20) as (main, pilot):
        await pilot.press("c")
        screen = main.app.screen
        assert isinstance(screen, CompareScreen)
        left, right = (screen.query_one(name, Transcript) for name in ("#text-a", "#text-b"))
        await wait_for(pilot, lambda: left.data is not None and right.data is not None)
        assert [i for i, cell in enumerate(left.data.cells) if cell.marked] == [PART]
        assert [i for i, cell in enumerate(right.data.cells) if cell.marked] == [PART]
        assert "softmax over the selected" in right.data.title
        await pilot.press("right_curly_bracket")
        assert main.look.at == PART
        assert screen.query_one(ScorePlot).data.cursor == PART
        assert screen.query_one(AgreementPanel).data is not None
        await pilot.press("x")
        assert "softmax over the selected" in left.data.title
        await pilot.press("d", "d")
        assert (screen.query_one(ExpertMap).data.marks == 1).sum() == 24
        await pilot.press("j", "left_square_bracket", "f", "escape")
        assert main.app.screen is main


def flipping(tokens: int = 40, first: int = 12) -> MemoryTrace:
    """Lane 1 takes one expert fewer from token `first` on; the text stays the same. Lane 2 never
    differs."""
    meta = meta_of()
    trace = MemoryTrace(meta)
    name = "num_experts_per_tok=3"
    lane_a, lane_c = frames_of(meta, tokens), frames_of(meta, tokens, lane=2)
    lane_b = frames_of(meta, tokens, lane=1)[:first]
    lane_b += frames_of(meta, tokens, lane=1, variant=name)[first:]
    for frames in zip(lane_a, lane_b, lane_c, strict=True):
        for frame in frames:
            trace.append(frame)
    return trace


def test_the_table_says_what_differs_why_and_by_how_much():
    trace = flipping()
    pair = pair_of(trace)
    history = History(trace.meta, trace)
    history.pull()
    a, b = history.lane(0), history.lane(1)
    assert a is not None and b is not None
    whys = compare_layers.causes_at(pair.table, history, a, b, 20)
    assert whys == dict.fromkeys(range(6), "gate")
    assert compare_layers.causes_at(pair.table, history, a, b, 5) == {}
    data = compare_layers.layers_data(pair, 20, 1, whys)
    frame_a, frame_b = trace.frame(60), trace.frame(61)
    for router, row in enumerate(data.rows):
        assert (row.differ, row.of, row.why, row.flips) == (1, 4, "gate", 28)
        assert row.sums == (
            pytest.approx(frame_a.score_sum[router]),
            pytest.approx(frame_b.score_sum[router]),
        )
        assert row.margin == pytest.approx(frame_a.margin[router])
        assert row.same == pytest.approx(12 / 40)
    assert not any(row.differ for row in compare_layers.layers_data(pair, 5, 0, {}).rows)
    assert compare_layers.causes_at(pair.table, history, *_parted(), 40) == {}


def _parted() -> tuple:
    pair = pair_of(parting())
    return pair.a, pair.b


def test_a_lane_that_was_cut_is_compared_anew():
    pair = pair_of(flipping())
    assert pair.comparison.flips == 28 * 6
    pair.b.append(frames_of(meta_of(), 15, lane=1)[14])  # token 14 again, and nothing after
    assert pair.feed() and pair.rows == 15
    assert pair.comparison.flips == 2 * 6 and len(pair.differs) == 15


def test_long_lanes_are_compared_in_steps():
    trace = flipping(60, 50)
    history = History(trace.meta, trace)
    history.pull()
    a, b = history.lane(0), history.lane(1)
    assert a is not None and b is not None
    pair = Pair(routers.table_of(trace.meta), a, b)
    assert [pair.feed(25) for _ in range(4)] == [True, True, True, False]
    whole = pair_of(trace)
    assert pair.comparison == whole.comparison and (pair.differs == whole.differs).all()


def test_columns_and_titles_give_way():
    assert [title for title, _, _ in fitting(200)][-1] == "flips"
    assert [title for title, _, _ in fitting(40)] == [
        "layer",
        "differ",
        "Δ {unit}",
        "Σ {0}",
        "Σ {1}",
    ]
    items = tuple(LaneItem(letter, "a long title", "63% ≠@10", False) for letter in "ABCDEFGH")
    data = LanesData(items, "same tokens")
    assert entries(data, 400)[0] == ("A a long title", "63% ≠@10")
    assert entries(data, 180)[0][0] in ("A a long …", "A a long t…", "A a long ti…")
    assert entries(data, 110)[0] == ("A", "63% ≠@10") and entries(data, 70)[0] == ("A", "63%")


@pytest.mark.parametrize("size", [(80, 24), (104, 30), (200, 60)])
async def test_every_size_shows_texts_lanes_and_every_view(size: tuple[int, int]):
    async with replaying(flipping(), size=size) as (main, pilot):
        await pilot.press("c")
        screen = main.app.screen
        seen = set()
        for _ in range(5):
            shown = [n for n in ("map", "layers", "agreement") if screen.query_one(f"#{n}").display]
            seen |= {*shown}
            for name in ("text-a", "text-b", "lanes-bar", *shown):
                region = screen.query_one(f"#{name}").region
                assert region.height >= (1 if name == "lanes-bar" else 5), name
                assert region.right <= size[0] and region.bottom <= size[1], name
            await pilot.press("d")
            await pilot.pause()
        assert seen == {"map", "layers", "agreement"}


async def test_the_first_divergence_is_a_key_away():
    async with replaying(flipping(), row=30) as (main, pilot):
        await pilot.press("c", "j", "j", "g")
        screen = main.app.screen
        assert (main.look.at, main.look.router) == (12, 0)
        await pilot.press("d")
        panel = screen.query_one(LayersPanel)
        assert panel.data.note.startswith("first ≠ @12 L00")
        assert "gate" in text_of(panel) and "≠1/4" in text_of(panel)
        assert "token 12, L00 (gate arithmetic, Δ" in screen.query_one(AgreementPanel).data.verdict
        await pilot.press("w", "g")
        assert main.look.at == 12, "lane C never differs: nothing moves"
        assert "same experts" in screen.query_one(AgreementPanel).data.verdict


async def test_all_lanes_stand_on_the_bar():
    async with replaying(flipping()) as (main, pilot):
        await pilot.press("c")
        screen = main.app.screen
        await wait_for(pilot, lambda: len(screen.pairs) == 2 and screen.pairs[0, 2].rows == 40)
        screen.draw()
        data = screen.query_one(LanesBar).data
        assert [item.letter for item in data.items] == ["A", "B", "C"]
        assert [item.found for item in data.items] == ["", "30% ≠@12", "100%"]
        assert [item.shown for item in data.items] == [True, True, False]
        await pilot.press("w")
        assert screen.shown == (0, 2) and "C" in screen.query_one("#text-b").data.title
        await pilot.press("x")
        assert screen.shown == (2, 0)


async def test_same_tokens_is_a_toggle_that_is_labelled():
    async with running(tokens=5) as (engine, main, pilot):
        await pilot.press("i", "a", "enter", "c")
        screen = main.app.screen
        bar = screen.query_one(LanesBar)
        await wait_for(pilot, lambda: bar.data is not None)
        assert bar.data.mode == "free text"
        await pilot.press("t")
        assert engine.watch.same_tokens and screen.query_one(LanesBar).data.mode == "same tokens"
        assert p.SameTokens(True) in engine.sent and isinstance(engine.sent[-1], p.Generate)
        await pilot.press("t")
        assert p.SameTokens(False) in engine.sent and not engine.watch.same_tokens


def of_two_models(flips: bool = True) -> MemoryTrace:
    """Lane 1 is of the second model. Its gate turned router 2 at token 20, by the row of expert 7,
    and router 3 at token 21, by several rows at once; its input did at token 22."""
    trace, held = MemoryTrace(meta_of()), flipping()
    meta = trace.meta
    second = tuple(replace(router, model=1) for router in meta.routers)
    models = ({"name": "base"}, {"name": "int4"})
    trace.meta = replace(meta, models=models, routers=(*meta.routers, *second))
    trace.event(TraceEvent("variant", {"sequence": 0, "expression": "trained", "model": 1}, 1))
    found = {20: [2, "gate", [[7, 0.25]]], 21: [3, "gate", []], 22: [2, "input", None]}
    for at in range(held.count):
        frame = held.frame(at)
        if frame.lane < 2:
            trace.append(frame)
        if flips and frame.lane == 1 and frame.position in found:
            data = {"sequence": 0, "against": 0, "flips": [found[frame.position]]}
            trace.event(TraceEvent("flips", data, 1, frame.position))
    return trace


async def test_a_recording_of_two_models_names_both():
    async with replaying(of_two_models()) as (main, pilot):
        await pilot.press("c")
        screen = main.app.screen
        items = screen.query_one(LanesBar).data.items
        assert items[0].title == "base trained" and items[1].title.startswith("int4 ")
        assert screen.query_one(ExpertMap).data.levels.shape == (6, 16)
        assert "int4 · " in screen.query_one("#text-b", Transcript).data.title


async def test_two_models_say_why_and_which_rows_of_the_gate():
    async with replaying(of_two_models(), row=20) as (main, pilot):
        await pilot.press("c", "d")
        screen = main.app.screen
        main.playing = True  # what the run told is there at once
        main.look.seek(20)
        screen._drawn = None
        screen.draw()
        whys = [row.why for row in screen.query_one(LayersPanel).data.rows]
        assert whys == ["", "", "gate", "", "", ""]
        while screen.view != "gate":
            await pilot.press("d")
        panel = screen.query_one(GatePanel)
        assert panel.data.rows == (("L02 E007", 1, 0.25),) and "L02 E007" in text_of(panel)
        assert "2 flips come from its rows, 1 by several rows at once" in text_of(panel)
        await pilot.press("x")  # what turned A's choice against B was not told
        assert panel.data.rows == () and "gate of A" in panel.data.title
        while screen.view != "layers":
            await pilot.press("d")
        assert not any(row.why for row in screen.query_one(LayersPanel).data.rows)


async def test_gates_of_two_models_are_not_judged_by_logits():
    async with replaying(of_two_models(flips=False), row=20) as (main, pilot):
        await pilot.press("c", "d")
        screen = main.app.screen
        assert any(row.differ for row in screen.query_one(LayersPanel).data.rows)
        assert not any(row.why for row in screen.query_one(LayersPanel).data.rows)
        while screen.view != "gate":
            await pilot.press("d")
        assert screen.query_one(GatePanel).data.rows == ()


@pytest.mark.parametrize(
    "data",
    [
        {"flips": [[0, "gate", [[1, 0.5]]]]},
        {"sequence": "0", "flips": []},
        {"sequence": 0, "flips": [[0, "gate", [[1, 0.5]]]] * 7},
        {"sequence": 0, "flips": {"0": "gate"}},
    ],
)
def test_flips_that_mean_nothing_are_passed_over(data):
    flips = Flips([0, 1], 4)
    flips.take(TraceEvent("flips", data, 1, 3))
    assert flips.causes(0, 1, 3) is None and flips.rows(0, 1) is None


@pytest.mark.parametrize(
    "item",
    [7, [], [9, "gate", None], [0, "magic", None], [True, "gate", None], [0, "gate", [[4, 0.5]]]]
    + [[0, "gate", rows] for rows in ([1], [[1]], [["1", 0.5]], [[1, float("nan")]], "row")],
)
def test_one_flip_that_means_nothing_spoils_no_other(item):
    flips = Flips([0, 1], 4)
    told = {"sequence": 0, "flips": [item, [1, "input", None]]}
    flips.take(TraceEvent("flips", told, 1, 3))
    assert flips.causes(0, 1, 3) == {1: "input"} and flips.rows(0, 1).flips == 0


async def test_two_checkpoints_open_side_by_side_on_the_same_tokens():
    engine = Engine()
    meta = of_two_models().meta
    engine.meta = meta
    engine.link = Scripted([p.Loaded({**FACTS, "beside": "int4"}, meta, None)])
    engine.watch = Watch(engine.link, "base")
    async with running(engine) as (engine, main, pilot):
        screen = main.app.screen
        assert isinstance(screen, CompareScreen)
        assert engine.sent == [p.SameTokens(True), p.AddLane("trained", model=1)]
        text = screen.query_one("#text-a", Transcript)
        await wait_for(pilot, lambda: text.data is not None)
        assert "press i" in text.data.title
        engine.link.push(p.LaneChanged(1, "trained", 0, model=1))
        await wait_for(pilot, lambda: len(screen.numbers()) == 2)
        titles = [item.title for item in screen.query_one(LanesBar).data.items]
        assert titles == ["base trained", "int4 trained"]
        await pilot.press("i", *"once", "enter")
        assert engine.sent[-1].messages == (("user", "once"),)
        await pilot.press("x", "plus")
        assert "a lane of int4" in str(main.app.screen.query_one(".title").render())
        await pilot.press(*"logits_bf16", "enter")
        assert engine.sent[-2] == p.AddLane("logits_bf16", model=1)


async def test_one_recorded_lane_cannot_be_compared():
    async with replaying() as (main, pilot):
        await pilot.press("c")
        assert main.app.screen is main


async def test_comparing_a_run_opens_a_lane_under_the_shown_variant():
    async with running() as (engine, main, pilot):
        await pilot.press("i", "a", "enter", "v", "v", "c")
        assert isinstance(main.app.screen, CompareScreen)
        kinds = [type(command) for command in engine.sent]
        assert kinds == [p.Generate, p.AddLane, p.Generate]
        assert engine.sent[1] == p.AddLane(engine.watch.variants[2])
        engine.link.push(p.LaneChanged(1, engine.watch.variants[2], 0))
        for a, b in zip(frames_of(engine.meta, 5), frames_of(engine.meta, 5, lane=1), strict=True):
            engine.link.push(p.Newest((a, b), 0, "running", 30.0))
        screen = main.app.screen
        await wait_for(pilot, lambda: screen.pair is not None and screen.pair.rows == 5)
        await pilot.press("space")
        assert engine.sent[-1] == p.Pause()


async def test_a_lane_is_forked_and_steered_from_the_token_under_the_cursor():
    async with running(tokens=20) as (engine, main, pilot):
        main.look.seek(9, following=False)
        main.look.router, main.look.expert = 2, 5
        await pilot.press("exclamation_mark")
        asked = main.app.screen.query_one(Input)
        assert asked.value == "trained with forbid=L2:5"
        asked.value = "trained with forbid=L2:99"
        await pilot.press("enter")
        assert "experts 0 to 15" in str(main.app.screen.query_one(".wrong", Static).render())
        asked.value = "num_experts_per_tok=3 with forbid=L2:5"
        await pilot.press("enter")
        expression = "num_experts_per_tok=3 with forbid=L2:5"
        assert engine.sent[-1] == p.AddLane(expression, fork_of=0, position=10)
        screen = main.app.screen
        assert isinstance(screen, CompareScreen)
        engine.link.push(p.LaneChanged(1, expression, 10, fork_of=0))
        for frame in frames_of(engine.meta, 20, lane=1, variant="num_experts_per_tok=3")[10:]:
            steered = replace(frame, variant=expression)
            engine.link.push(p.Newest((steered,), 0, "running", 30.0))
        await wait_for(pilot, lambda: screen.pair is not None and screen.pair.rows == 20)
        assert "with forbid=L2:5" in screen.query_one("#text-b", Transcript).data.title
        await pilot.press("escape", "v")
        assert main.app.screen is main  # the bar holds a variant that has no logits to be seen on
