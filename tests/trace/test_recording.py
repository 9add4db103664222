"""Nothing acknowledged is lost: kills, full disks, two writers, size limits, readers meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope import cli
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import TraceEvent
from moescope.trace.store import TraceReader, TraceWriter
from tests.trace.samples import a_frame, a_meta, differences, readable

ROOT = Path(__file__).parents[2]


MEMORY_DISK = Path("/dev/shm")  # a kill does not care whether the disk is slow; the suite does


def crash(job: str, runs: int, seed: int) -> Any:
    place = MEMORY_DISK if MEMORY_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, "-m", "tests.trace.crash", job, folder, str(runs), str(seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("runs", "seed"), [(40, 1), pytest.param(160, 2, marks=pytest.mark.slow)])
def test_kill_9_loses_no_acknowledged_token(runs: int, seed: int) -> None:
    result = crash("kill", runs, seed)
    assert result["wrong"] == []
    assert len(set(result["acknowledged"])) >= 8  # killed at many different moments


def test_a_full_disk_ends_the_recording_and_not_the_file() -> None:
    result = crash("full", 12, 3)
    assert result["wrong"] == []
    assert all(count > 0 for count in result["acknowledged"])


def test_a_disk_that_is_full_from_the_start_keeps_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.moetrace"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(MoescopeError, match="cannot be written: disk full") as caught:
            TraceWriter(path, a_meta())
    assert caught.value.code == ExitCode.OUTPUT and list(tmp_path.iterdir()) == []
    with TraceWriter(path, a_meta()) as writer:
        writer.append(a_frame())


def test_what_is_no_regular_file_is_not_recorded_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MoescopeError, match="pipe: is no regular file"):
        TraceWriter(tmp_path / "pipe", a_meta(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_kill_9_while_exporting_leaves_the_old_file_or_the_new_one() -> None:
    result = crash("export", 30, 4)
    assert result["wrong"] == []
    assert 0 < result["kept_old"] < 30


def test_a_file_that_is_being_written_is_named_with_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    with TraceWriter(path, a_meta()) as writer:
        writer.append(a_frame())
        for force in (False, True):
            with pytest.raises(MoescopeError) as caught:
                TraceWriter(path, a_meta(), force=force)
            assert f"trace is being written by process {os.getpid()}" in caught.value.message
            assert caught.value.code == ExitCode.TRACE
    assert len(readable(path)) == 1


@pytest.mark.parametrize("name", ["missing/x.moetrace", "folder", "y" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(MoescopeError) as caught:
        TraceWriter(tmp_path / name, a_meta())
    assert caught.value.code == ExitCode.OUTPUT
    assert name[:20] in caught.value.message


def test_the_reader_of_a_recording_sees_it_grow_and_end(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    frames = [a_frame(position) for position in range(700)]
    writer = TraceWriter(path, a_meta())
    writer.flush()
    reader = TraceReader.open(path, live=True, foreign=False)
    assert reader.count == 0 and not reader.refresh()
    for upto in (1, 17, 255, 256, 300, 520, 700):
        for frame in frames[reader.count : upto]:
            writer.append(frame)
        writer.event(TraceEvent("note", {"upto": upto}))
        writer.flush()
        assert reader.refresh()
        assert reader.count == writer.acknowledged == upto
        assert reader.events()[-1].data == {"upto": upto}
        assert not differences(reader.frame(upto - 1), frames[upto - 1])
        assert np.array_equal(reader.column("position"), np.arange(upto))
    writer.close()
    assert reader.refresh() and reader.complete
    assert all(not differences(a, b) for a, b in zip(frames, reader.frames(), strict=True))
    assert reader.problems == []
    reader.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.moetrace"]
    assert len(readable(path)) == 700


def test_reading_while_another_thread_records(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    frames = [a_frame(position) for position in range(1200)]
    writer = TraceWriter(path, a_meta())
    writer.flush()

    def work() -> None:
        for frame in frames:
            writer.append(frame)
        writer.close()

    thread = threading.Thread(target=work)
    with TraceReader.open(path, live=True) as reader:
        thread.start()
        while not reader.complete:
            reader.refresh()
            if reader.count:
                at = max(0, reader.count - 300)  # around the border of tail and chunks
                for i, frame in enumerate(reader.frames(at), start=at):
                    assert not differences(frame, frames[i])
        thread.join()
        assert reader.count == 1200 and reader.problems == []


def test_prefill_is_acknowledged_in_groups_and_decode_at_once(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.moetrace", a_meta()) as writer:
        for position in range(3):
            writer.append(a_frame(position, phase=0))
        writer.append(a_frame(3, phase=1))
        writer.flush()
        assert writer.acknowledged == 4


def test_a_bug_in_the_writer_ends_the_recording_and_hangs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("moescope.trace.output.columns_of_records", broken)
    writer = TraceWriter(tmp_path / "x.moetrace", a_meta())
    with pytest.raises(MoescopeError, match="ZeroDivisionError: oops") as caught:
        for position in range(5000):
            writer.append(a_frame(position))
    assert caught.value.code == ExitCode.BUG
    writer.close()
    assert len(readable(tmp_path / "x.moetrace")) == writer.acknowledged >= 256


def test_a_failure_that_nobody_heard_of_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moescope.trace.output.columns_of_records", full)
    writer = TraceWriter(tmp_path / "x.moetrace", a_meta())
    writer.append(a_frame())
    with pytest.raises(MoescopeError, match="disk full: recording stopped at token 1"):
        writer.close()
    assert len(readable(tmp_path / "x.moetrace")) == 1


def test_closing_twice_and_writing_after_it(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.moetrace", a_meta(), durable=True)
    writer.append(a_frame())
    writer.close()
    writer.close()
    with pytest.raises(MoescopeError, match="closed"):
        writer.append(a_frame(1))


def test_a_limit_drops_the_oldest_logits_first_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    sizes = {"routers": 8, "experts": 64}
    frames = [a_frame(position, **sizes) for position in range(1100)]
    with TraceWriter(path, a_meta(**sizes), limit_bytes=1_500_000) as writer:
        for frame in frames:
            writer.append(frame)
        writer.flush()
    dropped = writer.dropped_logits
    assert 0 < dropped < 1100 and dropped % 256 == 0
    with TraceReader.open(path) as reader:
        assert reader.problems == [] and reader.count == 1100
        assert reader.dropped_logits == dropped
        assert f"first {dropped:,} frames" in reader.events()[-1].data["text"]
        for i, frame in enumerate(reader.frames()):
            assert differences(frame, frames[i]) == (["logits"] if i < dropped else [])
        around = reader.column("logits", dropped - 20, dropped + 20)
        assert np.isnan(around).all(axis=(1, 2)).sum() == 20


def test_a_limit_that_logits_cannot_meet_stops_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    writer = TraceWriter(path, a_meta(record="weights"), limit_bytes=120_000)
    with pytest.raises(MoescopeError, match="limit of 120,000 bytes") as caught:
        for position in range(20_000):
            writer.append(a_frame(position, logits=None))
    assert caught.value.code == ExitCode.OUTPUT
    writer.close()
    assert len(readable(path)) == writer.acknowledged > 256


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_before_its_first_frame_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), TraceWriter(tmp_path / "x.moetrace", a_meta()) as writer:
        writer.event(TraceEvent("variant", {"expression": "trained"}))
        raise error
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept.moetrace"
    kept.touch(mode=0o600)
    with pytest.raises(error), TraceWriter(kept, a_meta()):
        raise error
    assert (kept.stat().st_size, kept.stat().st_mode & 0o777) == (0, 0o600)
    with pytest.raises(error), TraceWriter(kept, a_meta()) as writer:
        writer.append(a_frame())
        raise error
    assert len(readable(kept)) == 1 and kept.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_recording_appears_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Until it is under its name there is no file; from then on a copy of it says what it is."""
    path, seen = tmp_path / "x.moetrace", []
    real = getattr(os, place)

    def look(*arguments: object) -> None:
        seen.append(path.exists())
        real(*arguments)
        if place == "replace":
            copy = shutil.copy(path, tmp_path / "copy.moetrace")
            with TraceReader.open(copy) as reader:
                seen.append((reader.count, reader.complete, reader.meta.models))
            raise KeyboardInterrupt

    monkeypatch.setattr(os, place, look)
    if place == "replace":
        with pytest.raises(KeyboardInterrupt):
            TraceWriter(path, a_meta())
        assert seen == [False, (0, False, a_meta().models)]
        assert [left.name for left in tmp_path.iterdir()] == ["copy.moetrace"]
        code = cli.run(["lint", str(tmp_path / "copy.moetrace")])
        assert code == ExitCode.TRACE
    else:
        TraceWriter(path, a_meta()).close()
        assert seen == [False] and path.exists()
