"""The main screen over an engine: commands sent, news drawn, endings. The engine is scripted."""

from __future__ import annotations

import os
import signal

import pytest

from moescope.engine import protocol as p
from moescope.ui.app import MoescopeApp
from moescope.ui.widgets.expert_map import ExpertMap
from moescope.ui.widgets.loading_panel import LoadingPanel
from moescope.ui.widgets.status_line import StatusLine
from moescope.ui.widgets.transcript import Transcript
from tests.ui.piloted import Engine, held, running, text_of, wait_for
from tests.ui.recorded import frames_of


async def test_loading_says_what_is_read_and_then_gives_way():
    engine = Engine()
    engine.link._script.clear()
    engine.link.push(p.Loading("reading", 750, 1000, "layer 12"))
    app = MoescopeApp(engine.watch)
    async with app.run_test(size=(120, 40)) as pilot:
        panel = app.main.query_one(LoadingPanel)
        await wait_for(pilot, lambda: "layer 12" in text_of(panel))
        assert panel.display and not app.main.query_one("#work").display
        engine.link.push(p.Loaded({"name": "m"}, engine.meta, None))
        await wait_for(pilot, lambda: engine.watch.table is not None)
        await pilot.pause()
        assert not panel.display and app.main.query_one("#work").display


@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
async def test_a_failed_load_is_a_message_and_what_to_try(size):
    engine = Engine()
    engine.link._script.clear()
    engine.link.push(p.Failed("config.json: \x1b[31mexpected a MoE", "open another model", 3))
    app = MoescopeApp(engine.watch)
    async with app.run_test(size=size) as pilot:
        panel = app.main.query_one("#failed")
        await wait_for(pilot, lambda: panel.display)
        shown = str(panel.render())
        assert "expected a MoE" in shown and "Try: open another model" in shown
        assert "\x1b" not in shown
        await pilot.press("ctrl+q")
        assert app.return_code == 3


async def test_tokens_are_drawn_as_they_come():
    async with running(tokens=20) as (engine, main, pilot):
        text = main.query_one(Transcript)
        assert len(text.data.cells) == 20 and text.data.follow
        assert main.look.row is None and main.look.at == 19
        assert "30.0 tok/s" in text_of(main.query_one(StatusLine))
        for frame in engine.frames[20:30]:
            engine.link.push(p.Newest((frame,), 0, "running", 30.0))
        await wait_for(pilot, lambda: held(engine.watch) == 30)
        main.tick()
        assert main.query_one(ExpertMap).data is not None and len(text.data.cells) == 30


async def test_looking_back_does_not_follow_and_f_does():
    async with running(tokens=20) as (engine, main, pilot):
        await pilot.press("left_square_bracket", "left_square_bracket")
        assert main.look.at == 17
        engine.link.push(p.Newest((engine.frames[20],), 0, "running", 30.0))
        await wait_for(pilot, lambda: held(engine.watch) == 21)
        assert main.look.at == 17
        await pilot.press("f")
        assert main.look.at == 20 and main.look.row is None


async def test_a_prompt_is_typed_sent_and_left():
    async with running() as (engine, main, pilot):
        assert main.focused is None  # single keys are keys
        await pilot.press("i", *"Hi v", "enter")
        assert main.focused is None
        (command,) = engine.sent
        assert command.messages == (("user", "Hi v"),) and command.prompt == ""
        assert main.look.shown is None  # the v was typed, not pressed


async def test_esc_leaves_the_prompt():
    async with running() as (engine, main, pilot):
        await pilot.press("i", "x", "escape")
        assert main.focused is None and engine.sent == []


async def test_without_the_template_a_prompt_is_raw_text():
    async with running() as (engine, main, pilot):
        assert "chat on" in str(main.query_one("#chat").render())
        await pilot.press("ctrl+t", "i", "a", "enter")
        assert engine.sent[0].prompt == "a" and engine.sent[0].messages is None
        assert "chat off" in str(main.query_one("#chat").render())


async def test_a_second_turn_carries_the_first_answer():
    async with running(tokens=8) as (engine, _main, pilot):
        await pilot.press("i", "a", "enter")
        await pilot.press("i", "b", "enter")
        answer = "".join(frame.text for frame in engine.frames[4:8])
        assert engine.sent[1].messages == (("user", "a"), ("assistant", answer), ("user", "b"))
        assert engine.sent[1].continues


async def test_pause_step_stop_and_rerun():
    async with running(tokens=10) as (engine, _main, pilot):
        await pilot.press("space")
        assert engine.sent == [p.Pause()]
        engine.link.push(p.Newest((engine.frames[9],), 0, "paused", 0.0))
        await wait_for(pilot, lambda: engine.watch.mode == "paused")
        await pilot.press("full_stop", "space")
        assert engine.sent[1:] == [p.Step(1), p.Resume()]
        await pilot.press("ctrl+c")
        assert engine.sent[-1] == p.Stop()
        await pilot.press("r")
        assert len(engine.sent) == 4  # nothing was asked yet
        await pilot.press("i", "a", "enter", "r", "ctrl+r")
        first, again, other = engine.sent[-3:]
        assert again.messages == first.messages and again.sampling == first.sampling
        assert other.sampling.seed != first.sampling.seed and not again.continues


async def test_a_letter_makes_its_variant_the_generating_one():
    async with running(tokens=10) as (engine, _main, pilot):
        await pilot.press("B")
        assert engine.sent == [p.SetVariant(0, engine.watch.variants[1])]
        await pilot.press("H")
        assert len(engine.sent) == 1  # H is free


async def test_a_lane_that_is_done_starts_over_under_the_new_variant():
    async with running() as (engine, _main, pilot):
        await pilot.press("i", "a", "enter")
        engine.link.push(p.Newest((engine.frames[0],), 0, "idle", 0.0), p.Finished(0, 9, "length"))
        await wait_for(pilot, lambda: engine.watch.mode == "idle" and held(engine.watch) == 1)
        await pilot.press("B")
        assert isinstance(engine.sent[-2], p.SetVariant) and isinstance(engine.sent[-1], p.Generate)


async def test_sampling_is_checked_and_used_from_the_next_prompt_on():
    async with running() as (engine, main, pilot):
        await pilot.press("s")
        form = main.app.screen
        form.query_one("#temperature").value = "warm"
        form.query_one("#temperature").focus()
        await pilot.press("enter")
        assert main.app.screen is form
        form.query_one("#temperature").value = "0.8"
        form.query_one("#top_p").value = "0.95"
        await pilot.press("enter")
        assert main.app.screen is main
        await pilot.press("i", "a", "enter")
        assert engine.sent[-1].sampling.temperature == 0.8
        assert engine.sent[-1].sampling.top_p == 0.95


async def test_at_a_reading_pace_the_engine_is_stepped():
    async with running(tokens=10) as (engine, main, pilot):
        time = [0.0]
        main.now = lambda: time[0]
        await pilot.press("less_than_sign")  # from full speed to the fastest pace
        assert engine.sent == [p.Pause()] and main.playing
        engine.link.push(p.Newest((engine.frames[9],), 0, "paused", 0.0))
        main.tick()
        time[0] += 0.25
        main.tick()
        assert engine.sent[-1] == p.Step(16)  # 64 tokens a second
        sent = len(engine.sent)
        time[0] += 0.25
        main.tick()
        assert len(engine.sent) == sent  # those have not come yet
        assert main.mode == "running"
        await pilot.press("greater_than_sign")
        assert engine.sent[-1] == p.Resume()


async def test_the_demo_starts_by_itself():
    engine = Engine()
    engine.watch.demo = True
    async with running(engine) as (_, main, pilot):
        await wait_for(pilot, lambda: bool(engine.sent))
        assert isinstance(engine.sent[0], p.Generate) and engine.sent[0].paused
        assert main.playing


async def test_notes_and_failed_commands_are_told():
    async with running() as (engine, main, pilot):
        engine.link.push(p.Note("[b]a\x1b note[/b]"), p.Failed("no lane 9", "", 2, fatal=False))
        shown = main.app._notifications
        await wait_for(pilot, lambda: len(shown) >= 2)
        assert any("[b]a" in n.message and "\x1b" not in n.message for n in shown)
        assert engine.watch.failed is None


async def test_an_engine_that_dies_leaves_what_it_made():
    async with running(tokens=10) as (engine, main, pilot):
        engine.link.push(p.Failed("the engine died: signal 9", "more memory", 5))
        await wait_for(pilot, lambda: main.has_class("-failed"))
        assert "signal 9" in str(main.query_one("#failed").render())
        await pilot.press("space", "enter", "escape")  # nothing breaks


async def test_a_long_unsaved_run_is_asked_about():
    async with running(tokens=60) as (_engine, main, pilot):
        await pilot.press("ctrl+q")
        assert main.app.screen is not main and not main.app._exit
        await pilot.press("escape", "ctrl+q", "down", "enter")
        await wait_for(pilot, lambda: main.app._exit)


async def test_a_short_run_is_not():
    async with running(tokens=10) as (_engine, main, pilot):
        await pilot.press("ctrl+q")
        await wait_for(pilot, lambda: main.app._exit)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_end_the_screen_with_their_number(number):
    async with running() as (_, main, pilot):
        os.kill(os.getpid(), number)
        await wait_for(pilot, lambda: main.app._exit)
        assert main.app.return_code == 128 + number


async def test_another_sequence_starts_an_empty_text():
    async with running(tokens=10) as (engine, main, pilot):
        engine.link.push(p.Prompted(1, (5, 6), ("a", "b")))
        await wait_for(pilot, lambda: main.look.at == -1)
        main.tick()
        assert len(main.query_one(Transcript).data.cells) == 0
        for frame in frames_of(engine.meta, 3, sequence=1):
            engine.link.push(p.Newest((frame,), 0, "running", 30.0))
        await wait_for(pilot, lambda: main.look.at == 2)


async def test_opening_another_model_closes_the_first(tmp_path):
    first, second = Engine(), Engine(experts=8, top_k=2)
    (tmp_path / "config.json").write_text("{}")
    app = MoescopeApp(first.watch, lambda path: second.watch)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for(pilot, lambda: first.watch.table is not None)
        await pilot.press("o")
        app.screen.query_one("#path").value = str(tmp_path / "nowhere")
        await pilot.press("enter")
        assert app.screen is not app.main
        app.screen.query_one("#path").value = str(tmp_path)
        await pilot.press("enter")
        await wait_for(pilot, lambda: second.watch.table is not None)
        assert first.link.closed and app.main.subject is second.watch
        await wait_for(pilot, lambda: "6L×8E" in text_of(app.main.query_one(StatusLine)))


async def test_a_bug_of_ours_is_one_line_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path))

    def broken() -> None:
        prompt = "a secret prompt"
        raise KeyError(prompt)

    app = None
    with pytest.raises(KeyError):
        async with running(tokens=3) as (_, main, pilot):
            app = main.app
            monkeypatch.setattr(main, "draw", broken)
            await wait_for(pilot, lambda: not app.is_running)
    assert app is not None and app.return_code == 70
    (report,) = (tmp_path / "reports").iterdir()
    told = capsys.readouterr().err
    assert "a bug of ours (KeyError)" in told and "Traceback" not in told
    assert "secret" not in told and "secret" not in report.read_text()


async def test_the_screen_ends_when_its_supervisor_does(monkeypatch):
    async with running() as (_, main, pilot):
        main.app.outlive_nobody(os.getppid())
        assert main.app.is_running
        main.app.outlive_nobody(-1)
        await wait_for(pilot, lambda: not main.app.is_running)
        assert main.app.return_code == 128 + signal.SIGHUP


async def test_asking_twice_to_quit_quits():
    async with running(tokens=80) as (_, main, pilot):
        await pilot.press("ctrl+q")
        await wait_for(pilot, lambda: main.app.screen is not main)
        assert main.app.is_running
        await pilot.press("ctrl+q")
        await wait_for(pilot, lambda: not main.app.is_running)


async def test_closing_the_help_gives_its_room_back():
    async with running(tokens=20) as (_, main, pilot):
        classes = main.classes
        await pilot.press("question_mark")
        await wait_for(pilot, lambda: main.classes != classes)
        await pilot.press("escape")
        await wait_for(pilot, lambda: main.classes == classes)
