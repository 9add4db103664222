"""Running the application in tests, on a recording or a scripted engine; waiting on conditions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from textual.pilot import Pilot

from moescope.engine import protocol as p
from moescope.engine.link import Scripted
from moescope.trace.frames import Frame
from moescope.trace.memory import MemoryTrace
from moescope.ui.app import MoescopeApp
from moescope.ui.screens.main import MainScreen
from moescope.ui.watch import Watch, watch_source
from tests.ui.recorded import frames_of, meta_of, recorded

FACTS = {
    "name": "tiny-olmoe",
    "device": "cpu",
    "dtype": "float32",
    "weights_bytes": 1_500_000,
    "cache_bytes": 250_000,
    "context": 256,
    "has_chat_template": True,
}


async def wait_for(pilot: Pilot[Any], condition: Callable[[], bool], turns: int = 1500) -> None:
    """Let the application run until `condition` holds."""
    for _ in range(turns):
        if condition():
            return
        await pilot.pause(0.01)
    raise AssertionError("the condition never held")


@asynccontextmanager
async def replaying(
    trace: MemoryTrace | None = None, size: tuple[int, int] = (120, 40), row: int = 50
) -> AsyncIterator[tuple[MainScreen, Pilot[Any]]]:
    """The main screen on a recording, standing still at `row`."""
    trace = trace if trace is not None else recorded()
    app = MoescopeApp(watch_source(trace.meta, trace, "tiny-olmoe"))
    async with app.run_test(size=size) as pilot:
        main = app.main
        main.playing = False
        main.look.seek(row)
        main.draw()
        await pilot.pause()
        yield main, pilot


class Engine:
    """A scripted engine that answers nothing by itself; `say` pushes frames."""

    def __init__(self, tokens: int = 80, **options: Any) -> None:
        self.meta = meta_of(**options)
        self.frames: list[Frame] = frames_of(self.meta, tokens)
        self.link = Scripted(
            [p.Loading("reading", 1, 2, "layer 0"), p.Loaded(FACTS, self.meta, None)]
        )
        self.watch = Watch(self.link, "tiny-olmoe")

    def say(self, count: int, state: str = "running") -> None:
        """The first `count` frames have been made. One event each: none is replaced by the next."""
        for frame in self.frames[:count]:
            self.link.push(p.Newest((frame,), 0, state, 30.0))  # type: ignore[arg-type]

    @property
    def sent(self) -> list[p.Command]:
        return self.link.sent


@asynccontextmanager
async def running(
    engine: Engine | None = None, size: tuple[int, int] = (120, 40), tokens: int = 0
) -> AsyncIterator[tuple[Engine, MainScreen, Pilot[Any]]]:
    """The main screen over a scripted engine that is loaded and has made `tokens` tokens."""
    engine = engine or Engine()
    app = MoescopeApp(engine.watch)
    async with app.run_test(size=size) as pilot:
        main = app.main
        await wait_for(pilot, lambda: engine.watch.table is not None)
        if tokens:
            engine.say(tokens)
            await wait_for(pilot, lambda: held(engine.watch) >= tokens)
        yield engine, main, pilot


def held(watch: Watch) -> int:
    lane = watch.history.lane(0) if watch.history is not None else None
    return lane.count if lane is not None else 0


def text_of(widget: Any) -> str:
    """What a widget shows, as lines of text."""
    return "\n".join(widget.render_line(y).text.rstrip() for y in range(widget.size.height))
