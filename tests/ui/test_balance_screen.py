"""The balance screen: its numbers are the measures', it counts while tokens come, and it fits."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.diagnosis.balance_report import balance_of
from moescope.ui import balance_view, routers
from moescope.ui.balance_view import Tally
from moescope.ui.history import History
from moescope.ui.screens.balance import BalanceScreen, LoadPanel, MeasuresPanel, load_rows
from moescope.ui.watch import watch_source
from tests.ui.piloted import replaying, running, text_of, wait_for
from tests.ui.recorded import frames_of, meta_of, recorded


def shown(trace, router: int = 0, row: int = 10) -> balance_view.BalanceData:
    history = History(trace.meta, trace)
    history.pull()
    lane = history.lane(0)
    assert lane is not None
    tally = Tally(lane, 16)
    assert tally.feed() and not tally.feed()
    return balance_view.balance_data(routers.table_of(trace.meta), history, tally, router, row)


def test_the_numbers_are_those_of_the_command():
    trace = recorded(64)
    found, data = balance_of(trace), shown(trace, 2)
    router = found.routers[2]
    rows = {row.label: row for row in data.rows}
    assert data.load.tolist() == list(router.load) and data.fair == pytest.approx(64 * 4 / 16)
    for label, name in (("CV", "cv"), ("Gini", "gini"), ("Jain", "jain")):
        assert rows[label].here == f"{router.measures[name]:.3f}"
    assert rows["MaxVio"].here == f"{router.measures['max_violation']:.2f}"
    assert rows["CV"].chance == f"< {router.chance.cv_bound:.3f}" and not rows["CV"].noise
    lines = dict(data.lines)
    assert found.auxiliary is not None and router.layer_loss is not None
    loss = f"layer {router.layer_loss:.3f} (even 1) · transformers {found.auxiliary.pooled:.3f}"
    assert lines["aux loss, last 64"].startswith(loss)
    assert f"from {router.chance.tokens_needed} tokens" in lines["noise floor"]
    a, b = router.pairs[0].a, router.pairs[0].b
    assert lines["pairs, lift"].startswith(f"E{a:03d}+E{b:03d} {router.pairs[0].tokens} ×")
    assert data.picked == set(trace.frame(10).expert_ids[2].tolist())


def test_a_few_tokens_are_told_apart_from_imbalance():
    meta = meta_of()
    trace = recorded(0)
    for frame in frames_of(meta, 3, logits=False):
        trace.append(frame)
    data = shown(trace, row=0)
    assert next(row for row in data.rows if row.label == "MaxVio").noise
    assert "not recorded" in dict(data.lines)["auxiliary loss"]


def test_a_lane_that_was_cut_is_counted_anew():
    trace = recorded(20)
    history = History(trace.meta, trace)
    history.pull()
    lane = history.lane(0)
    assert lane is not None
    tally = Tally(lane, 16)
    tally.feed()
    lane.append(frames_of(trace.meta, 6)[5])  # replaces token 5 and all after
    assert tally.feed() and tally.load.sum() == 6 * 6 * 4


def test_columns_hold_the_busiest_the_even_share_and_the_picks():
    data = shown(recorded(40))
    wide = load_rows(data, 100, 12)
    text = ["".join(span for span, _ in row) for row in wide]
    assert len(text) == 12 and any("┈" in line for line in text)
    assert text[-2].count("▴") == 4 and text[-1].startswith("0")
    tallest = int(np.argmax(data.load))
    assert text[0][tallest * 6] == "█"
    narrow = load_rows(data, 7, 3)  # 16 experts in 6 columns
    assert max(sum(len(span) for span, _ in row) for row in narrow) <= 7 and len(narrow) == 3


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
async def test_it_opens_follows_the_layer_and_fits(size: tuple[int, int]):
    async with replaying(size=size) as (main, pilot):
        await pilot.press("b", "j")
        screen = main.app.screen
        assert isinstance(screen, BalanceScreen)
        panel = screen.query_one(MeasuresPanel)
        assert panel.data.title == "balance of L01 over 80 tokens" and main.look.router == 1
        assert "MaxVio" in text_of(panel) and "transformers" in text_of(panel)
        bars = screen.query_one(LoadPanel).region
        assert bars.height >= 5 and bars.bottom <= size[1] and bars.right <= size[0]
        await pilot.press("right_square_bracket")
        assert main.look.at == 51
        await pilot.press("escape")
        assert main.app.screen is main


async def test_it_counts_while_tokens_come_and_pauses():
    async with running(tokens=10) as (engine, main, pilot):
        await pilot.press("b")
        screen = main.app.screen
        assert isinstance(screen, BalanceScreen)
        for frame in engine.frames[10:30]:
            engine.link.push(type_of(frame))
        await wait_for(pilot, lambda: screen.tally is not None and screen.tally.rows == 30)
        await pilot.press("space", "w")
        assert type(engine.sent[-1]).__name__ == "Pause"


def type_of(frame):
    from moescope.engine import protocol as p

    return p.Newest((frame,), 0, "running", 30.0)


async def test_there_is_nothing_to_open_before_the_first_token():
    from moescope.ui.app import MoescopeApp

    trace = recorded(0)
    app = MoescopeApp(watch_source(trace.meta, trace, "empty"))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("b")
        assert app.screen is app.main
