"""Links: the engine in a real child process, its endings, and the doubles that speak like it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moescope.engine import link as links
from moescope.engine.mailbox import Inbox, Outbox
from moescope.engine.protocol import (
    AddLane,
    Close,
    DropLane,
    Event,
    Failed,
    Finished,
    Generate,
    LaneChanged,
    Link,
    Loaded,
    Loading,
    LoadRequest,
    Newest,
    Note,
    Pause,
    Prompted,
    Resume,
    Sampling,
    SetVariant,
    Step,
    Stop,
)
from moescope.engine.recording import recoverable
from moescope.engine.worker import Rate
from moescope.errors import MoescopeError
from moescope.trace.frames import DECODE
from moescope.trace.store import TraceReader
from tests.engine.fake import LETTERS

LOADER = "tests.engine.fake:open_fake"
ROOT = Path(__file__).parents[2]
ENDLESS = Sampling(temperature=1.0, seed=2, max_new_tokens=10_000)
PROMPT = "once upon a time"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class Talk:
    """A link and all it said, with waiting on conditions."""

    def __init__(self, link: Link) -> None:
        self.link, self.events = link, list[Event]()
        self._unread: deque[Event] = deque()

    def until(self, done: Callable[[Event], bool], seconds: float = 20.0) -> Event:
        """The next event for which `done` holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self._unread:
                self.events.append(self._unread.popleft())
                if done(self.events[-1]):
                    return self.events[-1]
            self._unread += self.link.poll()
            assert sum(isinstance(event, Newest) for event in self._unread) <= 1
            time.sleep(0.001)
        raise AssertionError(f"nothing came after {[type(e).__name__ for e in self.events[-9:]]}")

    def kind(self, kind: type) -> Event:
        return self.until(lambda event: isinstance(event, kind))

    def state(self, state: str) -> Newest:
        event = self.until(lambda e: isinstance(e, Newest) and e.state == state)
        assert isinstance(event, Newest)
        return event


def open_link(kind: str, model: str = "fake", trace: Path | None = None) -> Talk:
    request = LoadRequest(model, trace_path=str(trace) if trace else None, max_context=20_000)
    if kind == "child":
        return Talk(links.start(request, loader=LOADER))
    return Talk(links.InProcess(request, loader=LOADER))


@pytest.fixture(params=["child", "thread"])
def talk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Talk]:
    talk = open_link(request.param, "fake:slow", tmp_path / "run.moetrace")
    talk.kind(Loaded)
    yield talk
    talk.link.close()


def test_a_conversation_with_every_command(talk: Talk) -> None:
    """One engine, all commands: what a screen does in a minute."""
    path = talk.link.trace_path
    assert path is not None and path.name == "run.moetrace"
    assert any(isinstance(e, Loading) for e in talk.events)
    send = talk.link.send

    send(Generate(PROMPT, sampling=ENDLESS, paused=True))
    prompted = talk.kind(Prompted)
    assert isinstance(prompted, Prompted) and "".join(prompted.pieces) == PROMPT
    newest = talk.state("paused")
    assert [f.position for f in newest.frames] == [len(PROMPT) - 1]

    send(Step(3))
    stepped = talk.until(lambda e: isinstance(e, Newest) and e.frames[0].position == 18)
    assert isinstance(stepped, Newest) and stepped.state == "paused", "and then it waits again"

    send(SetVariant(0, "softmax_over_selected"))
    changed = talk.kind(LaneChanged)
    assert changed == LaneChanged(0, "softmax_over_selected", 19)
    send(Step())
    stepped = talk.until(lambda e: isinstance(e, Newest) and e.frames[0].position == 19)
    assert isinstance(stepped, Newest) and stepped.frames[0].variant == "softmax_over_selected"

    send(SetVariant(0, "no such variant"))
    failed = talk.kind(Failed)
    assert isinstance(failed, Failed) and not failed.fatal and failed.code == 2

    send(AddLane("trained", fork_of=0, position=17))
    assert talk.kind(LaneChanged) == LaneChanged(1, "trained", 17, "open", 0)
    send(Resume())
    talk.until(lambda e: isinstance(e, Newest) and len(e.frames) == 2 and e.recorded > 40)
    running = talk.state("running")
    assert running.tokens_per_second > 0

    send(Pause())
    paused = talk.state("paused")
    assert paused.tokens_per_second == 0
    send(DropLane(1))
    assert talk.kind(LaneChanged) == LaneChanged(
        1, "trained", paused.frames[1].position + 1, "dropped"
    )
    send(Resume())
    send(Stop())
    finished = talk.kind(Finished)
    assert isinstance(finished, Finished) and finished.reason == "stopped"
    talk.state("idle")

    send(Generate(" and", continues=True, sampling=Sampling(max_new_tokens=4)))
    talk.kind(Finished)
    pieces = {p for e in talk.events if isinstance(e, Newest) for p in e.pieces}
    assert {text for token, text in pieces if token < len(LETTERS)} <= set(LETTERS)
    talk.link.close()
    with TraceReader.open(path) as reader:
        assert reader.count == sum(1 for _ in reader.frames()) > 40
        assert [e.kind for e in reader.events() if e.kind == "fork"] == ["fork"]


def test_frames_are_recorded_before_they_are_told(tmp_path: Path) -> None:
    """What `recorded` counts is in the file while the engine goes on."""
    talk = open_link("child", "fake:slow", tmp_path / "run.moetrace")
    talk.kind(Loaded)
    talk.link.send(Generate(PROMPT, sampling=ENDLESS))
    path = talk.link.trace_path
    assert path is not None
    with TraceReader.open(path, live=True) as reader:
        for goal in (20, 60, 120):
            newest = talk.until(lambda e, g=goal: isinstance(e, Newest) and e.recorded >= g)
            assert isinstance(newest, Newest)
            reader.refresh()
            assert reader.count >= newest.recorded
    talk.link.close()


def test_a_killed_engine_is_told_and_its_tokens_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.moetrace"
    talk = open_link("child", "fake:slow", path)
    talk.kind(Loaded)
    talk.link.send(Generate(PROMPT, sampling=ENDLESS))
    newest = talk.until(lambda e: isinstance(e, Newest) and e.recorded > 50)
    assert isinstance(newest, Newest)
    os.kill(talk.link.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    failed = talk.kind(Failed)
    assert isinstance(failed, Failed) and failed.fatal and failed.code == 5
    assert failed.message == "the engine died: signal 9 SIGKILL"
    assert talk.link.poll() == []
    talk.link.send(Pause())  # nobody is there: no error
    talk.link.close()
    with TraceReader.open(path) as reader:
        assert reader.count >= newest.recorded


def test_an_engine_ignores_ctrl_c_and_commits_when_it_is_terminated(tmp_path: Path) -> None:
    path = tmp_path / "run.moetrace"
    talk = open_link("child", "fake:slow", path)
    talk.kind(Loaded)
    talk.link.send(Generate(PROMPT, sampling=ENDLESS))
    talk.until(lambda e: isinstance(e, Newest) and e.recorded > 30)
    pid = talk.link.pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGINT)
    talk.until(lambda e: isinstance(e, Newest) and e.recorded > 60)
    os.kill(pid, signal.SIGTERM)
    failed = talk.kind(Failed)
    assert isinstance(failed, Failed) and failed.message == "the engine ended by itself with code 0"
    assert not path.with_name(path.name + "-wal").exists(), "committed and folded"
    talk.link.close()


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("fake:refused", 3, "fake: config.json: expected a MoE"),
        ("fake:memory", 5, "out of memory at token 20; the trace is saved"),
        ("fake:panic", 70, "a bug of ours: Panic at token 20; the trace is saved; a report is in"),
    ],
)
def test_whatever_goes_wrong_is_a_failure_in_words(
    model: str, code: int, message: str, state: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.moetrace"
    talk = open_link("thread", model, path)
    talk.link.send(Generate(PROMPT, sampling=ENDLESS))
    failed = talk.kind(Failed)
    assert isinstance(failed, Failed) and failed.fatal and failed.code == code
    assert failed.message.startswith(message) and "secret" not in failed.message
    talk.link.close()
    if code != 3:
        with TraceReader.open(path) as reader:
            assert reader.count == 20
    for report in state.glob("reports/*"):
        assert "secret" not in report.read_text()


def test_invalid_logits_are_a_note_and_an_ending() -> None:
    talk = open_link("thread", "fake:poison")
    talk.link.send(Generate(prompt_ids=(1, 2, 20, 3)))
    note = talk.kind(Note)
    assert isinstance(note, Note)
    assert note.text == "lane A: layer 1: router logits are not finite"
    finished = next((e for e in talk.events if isinstance(e, Finished)), None)
    finished = finished or talk.kind(Finished)
    assert isinstance(finished, Finished) and finished.reason == "invalid_logits"
    talk.link.close()


def test_an_unsaved_run_is_private_and_gone_after_a_clean_exit(state: Path) -> None:
    talk = open_link("child", "fake:prints")
    talk.kind(Loaded)
    path = talk.link.trace_path
    assert path is not None and path.parent == state / "runs"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    talk.link.send(Generate(PROMPT, sampling=Sampling(max_new_tokens=5)))
    talk.kind(Finished)
    assert recoverable() == [], "a run of a living screen is not offered"
    talk.link.close()
    talk.link.close()
    assert list(path.parent.iterdir()) == []
    (log,) = state.glob("logs/*")
    assert "noise" in log.read_text() and log.stat().st_mode & 0o777 == 0o600


CRASH = """
import os, signal, sys, time
from moescope.engine import link
from moescope.engine.protocol import *
if __name__ == "__main__":
    engine = link.start(LoadRequest("fake:slow", max_context=20000), loader="{loader}")
    engine.send(Generate("{prompt}", sampling=Sampling(temperature=1.0, max_new_tokens=10000)))
    newest = None
    while newest is None or newest.recorded < 80:
        for event in engine.poll():
            newest = event if isinstance(event, Newest) else newest
        time.sleep(0.001)
    print(engine.pid, newest.recorded, engine.trace_path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_screen_that_crashes_loses_nothing_and_the_engine_ends() -> None:
    code = CRASH.format(loader=LOADER, prompt=PROMPT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL and not done.stderr
    pid, recorded, path = done.stdout.split()
    end = time.monotonic() + 20
    while _alive(int(pid)):
        assert time.monotonic() < end, "the engine outlived its screen"
        time.sleep(0.005)
    (run,) = recoverable()
    assert run.path == Path(path) and run.bytes > 0
    with TraceReader.open(run.path) as reader:
        assert reader.count >= int(recorded)
    assert not run.path.with_name(run.path.name + "-wal").exists(), "committed and folded"


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_engine_that_is_loading_ends_when_it_is_closed() -> None:
    talk = open_link("child", "fake:endless")
    talk.kind(Loading)
    began = time.monotonic()
    talk.link.close(timeout=10.0)
    assert time.monotonic() - began < 9.0, "it had to be killed"


def test_a_place_that_is_taken_is_refused_before_loading(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    talk = open_link("thread", "fake:endless", taken)
    failed = talk.kind(Failed)
    assert isinstance(failed, Failed) and failed.code == 6 and "already exists" in failed.message
    talk.link.close()
    assert taken.read_text() == "mine"


def test_a_recording_is_a_link_too(tmp_path: Path) -> None:
    path = tmp_path / "run.moetrace"
    talk = open_link("thread", "fake", path)
    talk.link.send(Generate(PROMPT, sampling=Sampling(max_new_tokens=5)))
    talk.kind(Finished)
    talk.link.close()
    replay = links.replay(path)
    loaded, finished = replay.poll()
    assert isinstance(loaded, Loaded) and loaded.facts["name"] == "fake"
    assert loaded.facts["num_routers"] == 3 and replay.trace_path == path
    assert finished == Finished(0, len(PROMPT) + 5, "length")
    replay.send(Generate("x"))
    (failed,) = replay.poll()
    assert isinstance(failed, Failed) and not failed.fatal
    replay.close()
    with pytest.raises(MoescopeError):
        links.replay(tmp_path / "nothing.moetrace")


def test_scripted_hands_out_what_it_was_given() -> None:
    note = Note("a")
    scripted = links.Scripted([note, [Note("b"), Note("c")]])
    scripted.send(Pause())
    assert [scripted.poll() for _ in range(3)] == [[note], [Note("b"), Note("c")], []]
    scripted.push(Failed("end", "", 5))
    scripted.push(Note("never"))
    assert len(scripted.poll()) == 1 and scripted.poll() == []
    assert scripted.sent == [Pause()]


# --- the mailboxes --------------------------------------------------------------------------------


def newest(number: int, *pieces: tuple[int, str]) -> Newest:
    return Newest((), number, "running", 0.0, pieces)


def test_only_the_last_unread_newest_is_sent_and_no_piece_is_lost() -> None:
    sent: list[Event] = []
    outbox = Outbox(sent.append)
    outbox.newest(newest(0, (0, "a")))
    _wait(lambda: len(sent) == 1)
    for number in range(1, 50):
        outbox.newest(newest(number, (number, "x")))
    outbox.put(Note("in between"))
    _wait(lambda: len(sent) == 2)
    assert sent[1] == Note("in between"), "one newest at most is on its way"
    outbox.credit()
    _wait(lambda: len(sent) == 3)
    last = sent[2]
    assert isinstance(last, Newest) and last.recorded == 49
    assert [token for token, _ in last.pieces] == list(range(1, 50))
    outbox.newest(newest(50))
    assert outbox.close(5.0)
    assert isinstance(sent[-1], Newest) and sent[-1].recorded == 50


def test_progress_replaces_progress_and_a_gone_reader_is_no_error() -> None:
    gate = threading.Event()
    sent: list[Event] = []

    def send(event: Event) -> None:
        gate.wait(10)
        if len(sent) == 3:
            raise BrokenPipeError
        sent.append(event)

    outbox = Outbox(send)
    for done in range(100):
        outbox.put(Loading("reading", done, 100))
    outbox.put(Note("done"))
    gate.set()
    _wait(lambda: len(sent) >= 2 and sent[-1] == Note("done"))
    assert len(sent) <= 3
    for _ in range(5):
        outbox.put(Note("nobody reads"))
    assert outbox.close(5.0)


def test_an_inbox_wakes_who_waits_and_says_when_it_ends() -> None:
    inbox = Inbox()
    inbox.put(Pause())
    assert inbox.take(wait=True) == [Pause()] and inbox.take(wait=False) == []
    assert not inbox.closing
    inbox.put(Close())
    assert inbox.closing and inbox.take(wait=True) == [Close()]
    inbox.close()
    assert inbox.take(wait=True) == []


def test_the_rate_starts_anew_after_a_gap() -> None:
    rate = Rate()
    assert rate.now(0.0) == 0.0
    for step in range(11):
        rate.add(2, step * 0.1)
    assert rate.now(1.0) == pytest.approx(20.0)
    rate.add(2, 100.0)
    assert rate.now(100.0) == 0.0
    rate.add(2, 100.5)
    assert rate.now(100.5) == pytest.approx(4.0)
    assert DECODE == 1


def _wait(done: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


async def test_an_engine_can_be_started_inside_a_running_screen() -> None:
    """Opening another model: Textual's stderr has no file number then."""
    from textual.app import App

    class Screen(App[None]):
        pass

    async with Screen().run_test():
        talk = open_link("child")
        talk.kind(Loaded)
        talk.link.close()
