"""The first frame comes before anything slow: who we are, then the main screen in its place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moescope.errors import ExitCode, MoescopeError
from moescope.ui.app import MoescopeApp
from moescope.ui.screens.opening import OpeningScreen
from moescope.ui.watch import Watch
from tests.ui.piloted import Engine, wait_for


async def test_the_name_is_there_before_the_engine_is_asked_for():
    engine, seen = Engine(), []

    def begin() -> Watch:
        seen.append((type(app.screen), app.export_screenshot()))
        return engine.watch

    app = MoescopeApp(None, begin=begin, name="tiny [b]olmoe[/b]")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for(pilot, lambda: app.begun)
        await wait_for(pilot, lambda: engine.watch.table is not None)
        assert app.main.subject is engine.watch
    ((screen, picture),) = seen
    assert screen is OpeningScreen
    assert "[b]olmoe[/b]" in picture and "loading" in picture


async def test_keys_pressed_too_early_do_no_harm():
    engine = Engine()
    app = MoescopeApp(None, begin=lambda: engine.watch, name="tiny")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("question_mark", "space", "ctrl+p", "escape", "v")
        await wait_for(pilot, lambda: app.begun)
        assert app.is_running


async def test_an_engine_that_cannot_start_is_an_error_of_the_command():
    def begin() -> Watch:
        raise MoescopeError("no engine here", code=ExitCode.RESOURCES)

    app = MoescopeApp(None, begin=begin, name="tiny")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for(pilot, lambda: app.failure is not None)
    assert app.failure is not None and app.failure.message == "no engine here"


@pytest.mark.parametrize("module", ["numpy", "plotext", "moescope.ui.screens.main"])
def test_the_first_frame_does_not_wait_for(module: str) -> None:
    code = (
        "import sys, moescope.cli, moescope.commands.open, moescope.ui.app\n"
        "import moescope.ui.screens.opening, moescope.engine.protocol\n"
        f"print({module!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
