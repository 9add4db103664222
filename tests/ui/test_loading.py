"""Keys where they mean little: while a model loads, in a recording, in few rows."""

from __future__ import annotations

import pytest
from textual.widgets import OptionList

from moescope.engine import protocol as p
from moescope.trace.memory import MemoryTrace
from moescope.ui import keys
from moescope.ui.app import MoescopeApp
from moescope.ui.screens.dialogs import ChoiceScreen
from moescope.ui.watch import watch_source
from moescope.ui.widgets.key_line import KeyLine
from moescope.ui.widgets.layer_panel import LayerPanel
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.transcript import Transcript
from tests.ui.piloted import Engine, replaying, text_of, wait_for
from tests.ui.recorded import meta_of

OPENS = ("o", "question_mark", "f1")  # what is drawn over the loading, and left by the next key
PRESSED = [
    name for key in (*keys.MAIN, *keys.APP) for name in key.keys.split(",") if name != "ctrl+q"
]
STAGES = {
    "starting": (),
    "reading": (p.Loading("reading", 1, 2, "layer 0"),),
    "tokenizer": (p.Loading("tokenizer", 0, 0, "tokenizer.json"),),
}


def loading(*told: p.Event) -> tuple[Engine, list[p.Event]]:
    """An engine that has told so much, and what it still holds back."""
    engine = Engine()
    held = list(engine.link._script)
    engine.link._script.clear()
    engine.link.push(*told)
    return engine, held


@pytest.mark.parametrize("stage", STAGES)
async def test_no_key_breaks_or_opens_what_needs_a_model(stage):
    engine, held = loading(*STAGES[stage])
    app = MoescopeApp(engine.watch)
    async with app.run_test(size=(80, 24)) as pilot:
        main = app.main
        offered = {active.binding.action for active in main.active_bindings.values()}
        assert {"open", "back_out", "help_keys"} <= offered
        assert not offered & {key.action for key in keys.MAIN if key.when != "always"}
        for key in PRESSED:
            await pilot.press(key, *(["escape"] if key in OPENS else []))
            assert app.screen is main and main.maximized is None, key
        assert engine.sent == [] and main.has_class("-loading")
        engine.link.push(*held)
        await wait_for(pilot, lambda: engine.watch.table is not None)
        engine.say(20)
        await wait_for(pilot, lambda: main.look.at == 19)
        await pilot.press("2")
        assert main.maximized is main.query_one("#layer")
        await wait_for(pilot, lambda: "expert" in text_of(main.query_one("#layer", LayerPanel)))
        await wait_for(pilot, lambda: any("Pause" in label for label in footer(main)))


def footer(main) -> list[str]:
    return [str(key.render()) for key in main.query("FooterKey")]


async def test_the_footer_is_not_built_again_while_nothing_changes(monkeypatch):
    built = []
    recompose = KeyLine.recompose

    async def counted(self):
        built.append(self)
        await recompose(self)

    monkeypatch.setattr(KeyLine, "recompose", counted)
    engine, _ = loading(*STAGES["tokenizer"])
    app = MoescopeApp(engine.watch)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for(pilot, lambda: bool(footer(app.main)))
        before = len(built)
        for _ in range(20):
            app.main.tick()
            app.main.refresh_bindings()
            await pilot.pause()
        assert len(built) == before <= 3


async def test_a_key_before_the_panels_are_there_does_nothing():
    async with replaying() as (main, _pilot):
        main._is_mounted = False
        assert not main.check_action("panel", ("layer",))
        main._is_mounted = True
        assert main.check_action("panel", ("layer",))


async def test_a_panel_key_opens_its_panel_while_another_has_the_screen():
    async with replaying(size=(80, 24)) as (main, pilot):
        for key, name in (("2", "layer"), ("3", "sums"), ("4", "token"), ("1", "map")):
            await pilot.press(key)
            assert main.maximized is main.query_one(f"#{name}")
        await pilot.press("1")
        assert main.maximized is None


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_a_damaged_recording_says_so(size):
    trace = MemoryTrace(meta_of())
    trace.problems += ["chunk 0: the checksum differs", "chunk 1 was skipped"]
    app = MoescopeApp(watch_source(trace.meta, trace, "bad.moetrace"))
    async with app.run_test(size=size) as pilot:
        status = app.main.query_one(StatusLine)
        await wait_for(pilot, lambda: "damaged: chunk 0" in text_of(status))
        assert app.main.query_one(Transcript).data.subtitle == "no token could be read"


@pytest.mark.parametrize("size", [(20, 5), (30, 8), (80, 24)])
async def test_a_choice_can_be_made_in_few_rows(size):
    async with replaying(size=size) as (main, pilot):
        found = []
        options = (("open", "Open it (e saves)"), ("delete", "Delete"), ("later", "Later"))
        main.app.push_screen(
            ChoiceScreen("A run ended before it was saved.", options), found.append
        )
        await wait_for(pilot, lambda: main.app.screen is not main)
        await pilot.pause()
        shown = main.app.screen.query_one(OptionList)
        seen = shown.region.intersection(main.app.screen.region)
        assert seen.height >= min(3, size[1] - 2) and seen.width >= 16
        await pilot.press("down", "enter")
        assert found == ["delete"]


async def test_a_recording_says_what_it_cannot_do():
    async with replaying() as (main, pilot):
        assert not any(name in label for label in footer(main) for name in ("Prompt", "Fork"))
        for key in ("s", "exclamation_mark", "K", "i", "B"):
            told = len(main.app._notifications)
            await pilot.press(key)
            assert len(main.app._notifications) == told + 1, key
        assert all("recording" in note.message for note in main.app._notifications)
        assert "replay" in text_of(main.query_one(StatusLine))
