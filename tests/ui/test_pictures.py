"""What the screens look like. `pytest tests/ui/test_pictures.py --snapshot-update` after a change
that was meant, and look at each."""

from __future__ import annotations

from typing import Any

import pytest
from textual.pilot import Pilot

from moescope.trace.memory import MemoryTrace
from moescope.ui.app import MoescopeApp
from moescope.ui.watch import watch_source
from tests.ui.piloted import wait_for
from tests.ui.recorded import recorded
from tests.ui.test_compare_screen import parting


def still(*keys: str, row: int = 50) -> Any:
    """Stop everything that moves by itself, go to a row, press keys."""

    async def arrange(pilot: Pilot[Any]) -> None:
        main = pilot.app.main  # type: ignore[attr-defined]
        await wait_for(pilot, lambda: main._timer is not None)
        main._timer.stop()
        main.playing = False
        main.look.seek(row)
        main.clock.measured = 15.0
        main.clock.beat = lambda now: False
        main.draw()
        await pilot.press(*keys)
        screen = pilot.app.screen
        if hasattr(screen, "_timer"):
            await wait_for(pilot, lambda: screen._timer is not None)
            screen._timer.stop()
        await pilot.pause()

    return arrange


def app_of(trace: MemoryTrace) -> MoescopeApp:
    app = MoescopeApp(watch_source(trace.meta, trace, "tiny-olmoe"))
    app.colour_depth = "truecolor"  # type: ignore[attr-defined]
    return app


TALL = {"layers": 30, "experts": 64, "top_k": 6}
# name -> (size, model, keys)
PICTURES: dict[str, tuple[tuple[int, int], dict[str, int], tuple[str, ...]]] = {
    "main-80x24": ((80, 24), {}, ("j", "l")),
    "main-120x40": ((120, 40), {}, ("j", "l")),
    "main-200x60": ((200, 60), TALL, ()),
    "variant-120x40": ((120, 40), {"layers": 48, "experts": 128, "top_k": 8}, ("v",)),
    "token-120x40": ((120, 40), {}, ("enter", "j")),
}


@pytest.mark.parametrize("name", PICTURES)
def test_main(snap_compare: Any, name: str) -> None:
    size, model, keys = PICTURES[name]
    app = app_of(recorded(80, **model))
    assert snap_compare(app, terminal_size=size, run_before=still(*keys))


def test_compare(snap_compare: Any) -> None:
    app = app_of(parting())
    assert snap_compare(app, terminal_size=(120, 40), run_before=still("c", row=33))
