"""Unsaved runs: private, capped, found again after a crash, and never while somebody holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moescope.engine import recording
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.recording import new_private_run, open_writer, recoverable, trace_meta
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.store import TraceReader
from tests.engine.fake import FakeTokenizer, fake


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def record(path: Path, tokens: int = 30, **request: object) -> Session:
    model = fake()
    model.facts["context"] = 4096
    wanted = LoadRequest("fake", trace_path=str(path), **request)
    meta = trace_meta(model, record=wanted.record, redact=wanted.redact)
    session = Session(model, FakeTokenizer(), open_writer(wanted, meta, True), record=wanted.record)
    sampling = Sampling(temperature=1.0, max_new_tokens=tokens)
    session.tokenizer.end_ids = session._end_ids = ()
    for count, _ in enumerate(session.generate(Generate("once upon", sampling=sampling))):
        if count % 64 == 0:  # how far the disk lags behind shall not matter
            session.recorder.writer.flush()
    return session


def test_a_private_run_is_nobody_elses_and_goes_when_discarded(state: Path) -> None:
    run = new_private_run()
    assert run.path.parent == state / "runs" and run.path.stat().st_mode & 0o777 == 0o600
    session = record(run.path)
    assert run.path.stat().st_mode & 0o777 == 0o600
    assert recoverable() == [], "being written"
    session.close()
    assert recoverable() == [], "held by this process"
    run.discard()
    run.discard()
    assert list((state / "runs").iterdir()) == []


def test_a_released_run_is_offered_newest_first_and_opens() -> None:
    runs = [new_private_run() for _ in range(3)]
    for age, run in enumerate(runs[:2]):
        record(run.path).close()
        os.utime(run.path, (1000 + age, 1000 + age))
    for run in runs:
        run.release()
    found = recoverable()
    assert [run.path for run in found] == [runs[1].path, runs[0].path]
    assert not runs[2].path.exists(), "an empty one is not worth offering"
    with TraceReader.open(found[0].path) as reader:
        assert reader.count == 39
    for unsaved in found:
        recording.remove(unsaved.path)
    assert recoverable() == []


def test_a_run_of_a_dead_process_is_offered_and_one_of_a_living_is_not() -> None:
    code = (
        "import os, signal, sys\n"
        "from moescope.engine.recording import new_private_run\n"
        "run = new_private_run()\n"
        "run.path.write_bytes(b'x')\n"
        "print(run.path, flush=True)\n"
        "sys.stdin.read()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        path = Path(other.stdout.readline().strip())
        assert recoverable() == []
        other.stdin.close()
        other.wait(20)
    assert [run.path for run in recoverable()] == [path]


def test_a_run_at_its_limit_loses_its_oldest_logits_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "LIMIT_BYTES", 150_000)
    run = new_private_run()
    session = record(run.path, tokens=600, record="logits")
    session.close()
    notes = [event.text for event in session.take_events() if hasattr(event, "text")]
    assert any("is at its limit: logits of the first" in note for note in notes)
    with TraceReader.open(run.path) as reader:
        assert reader.frame(0).logits is None and reader.frame(reader.count - 1).logits is not None
        assert reader.frame(0).weights is not None
    run.discard()


def test_a_redacted_run_holds_no_token_and_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.moetrace"
    record(path, redact=True).close()
    with TraceReader.open(path) as reader:
        assert {frame.token_id for frame in reader.frames()} == {-1}
        assert {frame.text for frame in reader.frames()} == {""}
        assert not {"prompt", "pieces"} & {event.kind for event in reader.events()}


def test_no_place_for_a_run_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path / "file"))
    with pytest.raises(MoescopeError, match="file/runs: cannot be written") as caught:
        new_private_run()
    assert caught.value.code == ExitCode.OUTPUT
    assert recoverable() == []


def test_a_place_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    recording.check_place(tmp_path / "new")
    (tmp_path / "empty").touch()
    recording.check_place(tmp_path / "empty")
    (tmp_path / "full").write_text("x")
    for path, problem in (
        (tmp_path / "full", "already exists"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is no regular file"),
        (tmp_path / "no" / "where", "the folder does not exist"),
    ):
        with pytest.raises(MoescopeError, match=problem):
            recording.check_place(path)
