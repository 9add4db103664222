"""The screen over a real engine loop and a real trace file; and in a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from moescope.engine import protocol as p
from moescope.engine.link import InProcess
from moescope.trace.store import TraceReader, TraceWriter
from moescope.ui.app import MoescopeApp
from moescope.ui.watch import Watch, watch_trace
from moescope.ui.widgets.transcript import Transcript
from tests.ui.piloted import held, wait_for
from tests.ui.recorded import recorded

FAKE = "tests.engine.fake:open_fake"


async def test_a_run_is_watched_saved_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = p.LoadRequest("fake", device="cpu", trace_path=str(tmp_path / "live.moetrace"))
    watch = Watch(InProcess(request, loader=FAKE), "fake")
    app = MoescopeApp(watch)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for(pilot, lambda: watch.table is not None, 2000)
        watch.sampling = p.Sampling(max_new_tokens=24)
        watch.chat = False
        await pilot.press("i", *"once", "enter")
        await wait_for(pilot, lambda: bool(watch.finished), 2000)
        await wait_for(pilot, lambda: held(watch) >= 20, 2000)
        await pilot.pause(2.0)  # the last frames are drawn at the pace of the screen
        cells = app.main.query_one(Transcript).data.cells
        assert [cell.position for cell in cells] == list(range(len(cells)))
        for name in ("saved.moetrace", "saved.jsonl"):
            await pilot.press("e")
            app.screen.query_one("#path").value = name
            await pilot.press("enter")
            await wait_for(pilot, lambda: app.screen is app.main, 2000)
        assert watch.unsaved <= 0
        await pilot.press("e")
        app.screen.query_one("#path").value = "saved.moetrace"
        await pilot.press("enter")
        assert "exists already" in str(app.screen.query_one(".wrong").render())
        await pilot.press("escape")
    texts = watch.history.lane(0).texts
    watch.close()
    assert (tmp_path / "saved.jsonl").stat().st_size > 0
    again = watch_trace(tmp_path / "saved.moetrace")
    again.pump()
    assert again.history.lane(0).texts == texts
    again.close()


def record(path: Path, tokens: int = 40) -> Path:
    trace = recorded(tokens)
    with TraceWriter(path, trace.meta) as writer:
        for event in trace.events():
            writer.event(event)
        for frame in trace.frames():
            writer.append(frame)
    with TraceReader.open(path) as reader:
        assert reader.count == tokens
    return path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux")
@pytest.mark.parametrize("ending", ["ctrl+q", "TERM"])
def test_a_real_terminal_shows_the_screen_and_gets_itself_back(tmp_path, ending):
    path, session = record(tmp_path / "r.moetrace"), f"moescope-{uuid.uuid4().hex[:8]}"
    command = f"{sys.executable} -m moescope replay {path}; echo code $?; read _"

    def tmux(*words: str) -> str:
        found = subprocess.run(
            ["tmux", "-L", session, *words], capture_output=True, text=True, check=False
        )
        return found.stdout

    def wait_text(text: str) -> str:
        for _ in range(300):
            if text in (shown := tmux("capture-pane", "-p")):
                return shown
            time.sleep(0.1)
        raise AssertionError(f"{text!r} never came; the terminal shows\n{shown}")

    tmux("new-session", "-d", "-x", "120", "-y", "40", command)
    try:
        shown = wait_text("Once upon a time")
        assert "tiny-olmoe" in shown and "replay" in shown
        if ending == "ctrl+q":
            tmux("send-keys", "C-q")
            after = wait_text("code 0")
        else:
            pids = subprocess.run(
                ["pgrep", "-f", str(path)], capture_output=True, text=True, check=False
            ).stdout.split()
            subprocess.run(["kill", "-TERM", max(pids, key=int)], check=False)
            after = wait_text("code 143")
        assert "tiny-olmoe" not in after  # the alternate screen is gone
    finally:
        tmux("kill-server")


def alive(group: set[int]) -> set[int]:
    """Which of these processes still run (a zombie does not)."""
    found = set()
    for pid in group:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        found |= {pid} if state != "Z" else set()
    return found


def below(pid: int) -> set[int]:
    """A process and everything it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return {pid}
    return {pid}.union(*(below(int(child)) for child in children))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("lost", ["terminal", "supervisor"])
def test_nothing_outlives_the_terminal_or_the_supervisor(tmp_path, lost):
    path = record(tmp_path / "r.moetrace")
    pid, master = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "moescope", "replay", str(path)])
    output, end = b"", time.monotonic() + 60
    while b"Once" not in output and time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            output += os.read(master, 1 << 16)
    assert b"Once" in output
    family = below(pid)
    assert len(family) >= 2
    if lost == "supervisor":
        os.kill(pid, signal.SIGKILL)
    os.close(master)
    end = time.monotonic() + 20
    left = family
    while (left := alive(left)) and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left
