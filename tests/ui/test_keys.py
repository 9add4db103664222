"""The key tables: unique, complete, and every action they name exists. Clock, pace and tour."""

from __future__ import annotations

import pytest

from moescope.ui import keys
from moescope.ui.app import MoescopeApp
from moescope.ui.arrange import NEEDS, arrange
from moescope.ui.clock import AWAY, Clock
from moescope.ui.pace import Meter, Pace
from moescope.ui.screens.balance import BalanceScreen
from moescope.ui.screens.compare import CompareScreen
from moescope.ui.screens.main import MainScreen
from moescope.ui.screens.token import TokenScreen
from moescope.ui.tour import PROMPTS, REST, Tour

SCREENS = {
    "app": MoescopeApp,
    "main": MainScreen,
    "compare": CompareScreen,
    "token": TokenScreen,
    "balance": BalanceScreen,
}


@pytest.mark.parametrize("where", sorted(SCREENS))
def test_every_key_is_bound_once_to_an_action_that_exists(where):
    table = keys.TABLES[where]
    pressed = [name for key in table for name in key.keys.split(",")]
    assert len(set(pressed)) == len(pressed)
    assert len({key.id for key in table}) == len(table)
    for key in table:
        assert hasattr(SCREENS[where], f"action_{key.action.split('(')[0]}"), key
    ids = {binding.id for binding in keys.bindings(where) if not binding.system}
    assert ids == {f"{where}.{key.id}" for key in table}


@pytest.mark.parametrize("where", ["main", "compare", "token"])
def test_the_footer_holds_eight_at_most(where):
    shown = [key for key in (*keys.TABLES[where], *keys.APP) if key.footer]
    assert 4 <= len(shown) <= 8


def test_the_clock_slows_down_when_late_and_comes_back():
    clock, now = Clock(), 0.0
    assert clock.rate == 15
    for _ in range(6):
        now += 0.2
        clock.beat(now)
    assert clock.rate == 8
    for _ in range(6):
        now += 0.3
        clock.beat(now)
    assert clock.rate == 4
    for _ in range(400):
        now += 1 / clock.rate
        clock.beat(now)
    assert clock.rate == 15
    clock.away = True
    assert clock.rate == AWAY


def test_a_timer_that_rested_is_not_late():
    clock, now = Clock(), 0.0
    for _ in range(20):
        now += 10
        clock.rest()
        clock.beat(now)
        now += 1 / 15
        clock.beat(now)
    assert clock.rate == 15


def test_a_screen_that_shares_few_cores_draws_less():
    assert Clock(2).rate == 8.0 and Clock(16).rate == Clock().rate == 15.0


def test_a_pace_owes_whole_tokens_and_forgets_long_sleeps():
    pace = Pace(8.0)
    pace.due(0.0)
    owed = [pace.due(n / 15) for n in range(1, 31)]
    assert sum(owed) == 16 and max(owed) == 1
    assert pace.due(1000.0) == 8
    pace.change(1, can_be_full=True)
    assert pace.rate == 16 and pace.speed == 2
    for _ in range(9):
        pace.change(1, can_be_full=True)
    assert pace.rate is None and pace.due(2000.0) == 0
    for _ in range(20):
        pace.change(-1, can_be_full=True)
    assert pace.rate == 1


def test_the_meter_says_what_came():
    meter = Meter()
    rates = [meter.rate(n / 10, n) for n in range(50)]
    assert rates[0] == 0 and rates[-1] == pytest.approx(10)
    assert meter.rate(5.0, 0) == 0  # another text


def test_the_tour_goes_on_a_moment_after_each_end():
    tour, now = Tour(), 0.0
    assert tour.next(now, True) == PROMPTS[0]
    assert tour.next(now + 1, False) is None
    assert tour.next(now + 2, True) is None
    assert tour.next(now + 2 + REST, True) == PROMPTS[1]
    for _ in range(3 * len(PROMPTS)):
        now += 100
        tour.next(now, False)
        tour.next(now, True)
        tour.next(now + REST, True)
    assert tour.next(now + 1000, True) is None


@pytest.mark.parametrize("width", [60, 80, 103, 104, 120, 150, 200, 320])
@pytest.mark.parametrize("height", [16, 24, 30, 40, 60, 100])
@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (6, 16, 4), (48, 128, 8), (61, 256, 8), (94, 512, 10)]
)
def test_panels_always_fit(width, height, shape):
    assert width >= NEEDS[0] and height >= NEEDS[1]
    place = arrange(width, height - 5, *shape)
    assert 1 < place.map_height <= height - 5 and 30 < place.left <= width
    if place.kind == "column":
        assert place.map_height + 1 + 3 <= height - 5
    else:
        used = place.map_height
        used += 0 if "layer" in place.out or place.kind == "lone" else place.layer_height
        assert used <= height - 5 and width - place.left >= 40
