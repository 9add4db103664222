"""Two lanes side by side: on recordings of lanes that part, and from a run with one lane."""

from __future__ import annotations

import numpy as np

from moescope.engine import protocol as p
from moescope.trace.memory import MemoryTrace
from moescope.ui import compare_view, routers
from moescope.ui.compare_view import Pair
from moescope.ui.history import History
from moescope.ui.screens.compare import CompareScreen
from moescope.ui.view import Cursor
from moescope.ui.widgets.agreement_panel import AgreementPanel
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.score_plot import ScorePlot
from moescope.ui.widgets.transcript import Transcript
from tests.ui.piloted import replaying, running, wait_for
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
    assert (compare_view.difference_map(pair, 40, "B", Cursor()).marks == 2).sum() == 24


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
        assert [i for i, cell in enumerate(left.data.cells) if cell.marked] == [PART]
        assert [i for i, cell in enumerate(right.data.cells) if cell.marked] == [PART]
        assert "softmax over the selected" in right.data.title
        await pilot.press("right_curly_bracket")
        assert main.look.at == PART
        assert screen.query_one(ScorePlot).data.cursor == PART
        assert screen.query_one(AgreementPanel).data is not None
        await pilot.press("x")
        assert "softmax over the selected" in left.data.title
        await pilot.press("d")
        assert (screen.query_one(ExpertMap).data.marks == 1).sum() == 24
        await pilot.press("j", "left_square_bracket", "f", "escape")
        assert main.app.screen is main


async def test_small_terminals_show_texts_and_numbers():
    async with replaying(parting(), size=(80, 24)) as (main, pilot):
        await pilot.press("c")
        screen = main.app.screen
        for name in ("#text-a", "#text-b", "#agreement"):
            region = screen.query_one(name).region
            assert region.height > 4 and region.right <= 80 and region.bottom <= 24


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
