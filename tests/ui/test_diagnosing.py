"""The verdict beside a replay: asked for by a key, told when it comes."""

from __future__ import annotations

from pathlib import Path

from textual.widgets import Static

from moescope.demo import TRACE
from moescope.ui import diagnosing
from moescope.ui.app import MoescopeApp
from moescope.ui.screens.dialogs import AskScreen, MessageScreen
from moescope.ui.watch import watch_trace


async def test_a_trace_is_diagnosed_in_a_process_of_its_own() -> None:
    title, text = await diagnosing.verdict(TRACE, "demo", 0)
    assert title.startswith("routed correctly: 100.0 % of ")
    assert "Σ" in text and "noise" in text


async def test_what_is_wrong_is_said_instead(tmp_path: Path) -> None:
    title, text = await diagnosing.verdict(TRACE, str(tmp_path / "none"), 0)
    assert title.startswith("moescope: ") and "Traceback" not in title + text


async def test_the_key_asks_for_the_model_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    asked: list[tuple[Path, str, int]] = []

    async def answer(trace: Path, model: str, lane: int) -> tuple[str, str]:
        asked.append((trace, model, lane))
        return "routed wrong: [bold]softmax_over_selected", "  fix  …"

    monkeypatch.setattr(diagnosing, "verdict", answer)
    app = MoescopeApp(watch_trace(TRACE))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        await pilot.press("d")
        assert isinstance(app.screen, AskScreen)
        await pilot.press(*"demo", "enter")
        await pilot.pause()
        assert isinstance(app.screen, MessageScreen)
        shown = "\n".join(str(widget.render()) for widget in app.screen.query(Static))
        assert "[bold]softmax_over_selected" in shown and "fix" in shown
        await pilot.press("escape")
        await pilot.press("d")
        await pilot.pause()
        assert isinstance(app.screen, MessageScreen)
    assert asked == [(TRACE, "demo", 0)] * 2
