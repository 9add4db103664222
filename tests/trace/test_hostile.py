"""Somebody else's file: whatever is in it, a sentence or the truth, and never a traceback."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.errors import ExitCode, MoescopeError
from moescope.trace import database
from moescope.trace.columns import checksum, pack, unpack
from moescope.trace.frames import Frame, TraceEvent
from moescope.trace.output import meta_checksum
from moescope.trace.record import record
from moescope.trace.store import TraceReader, TraceWriter
from tests.trace.samples import a_frame, a_meta, differences

CHUNK = 40  # frames; real ones have 256
FRAMES = [a_frame(position) for position in range(60)]
EVENTS = [TraceEvent("prompt", {"text": "Once", "ids": [5]}), TraceEvent("note", {"text": "half"})]


@contextmanager
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moescope.trace.output.CHUNK_FRAMES", CHUNK)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chunk of 40, one of 20, two events."""
    path = tmp_path_factory.mktemp("traces") / "good.moetrace"
    with small_chunks(), TraceWriter(path, a_meta()) as writer:
        writer.event(EVENTS[0])
        for frame in FRAMES:
            writer.append(frame)
        writer.event(EVENTS[1])
    return path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording copied in the middle, with its -wal: a chunk, and 20 frames in the tail."""
    folder = tmp_path_factory.mktemp("traces")
    path = folder / "good.moetrace"
    with small_chunks(), TraceWriter(path, a_meta()) as writer:
        writer.event(EVENTS[0])
        for frame in FRAMES:
            writer.append(frame)
        writer.event(EVENTS[1])
        writer.flush()
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"good.moetrace{suffix}", folder / f"cut.moetrace{suffix}")
    return folder / "cut.moetrace"


def outcome(path: Path) -> str:
    """`refused`, `reported` (frames skipped, and said so) or `whole`; fails on anything else."""
    started = time.monotonic()
    try:
        with TraceReader.open(path) as reader:
            frames = list(reader.frames())
            reader.column("score_sum")
            events = reader.events()
            problems = list(reader.problems)
            meta = reader.meta
    except MoescopeError as error:
        assert error.code == ExitCode.TRACE
        assert error.message.isprintable() and len(error.message) < 600
        return "refused"
    finally:
        assert time.monotonic() - started < 5
    truth = [record(frame) for frame in FRAMES]
    for frame in frames:
        assert record(frame) == truth[frame.position], "silently wrong"
    assert all(event in EVENTS for event in events), "silently wrong"
    assert meta.routers == a_meta().routers
    if len(frames) < len(FRAMES) or len(events) < len(EVENTS):
        assert problems, "silently short"
    return "reported" if problems else "whole"


def test_the_good_ones_are_whole(finished: Path, interrupted: Path) -> None:
    assert outcome(finished) == "whole"
    assert outcome(interrupted) == "whole"


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_reported(finished: Path, tmp_path: Path, seed: int) -> None:
    """1,000 files: flipped bits, overwritten, zeroed, doubled and moved stretches."""
    chance = random.Random(seed)
    good = finished.read_bytes()
    path = tmp_path / "bad.moetrace"
    seen = {"refused": 0, "reported": 0, "whole": 0}
    for _ in range(250):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            _mutate(data, chance)
        path.write_bytes(data)
        seen[outcome(path)] += 1
    assert seen["refused"] and seen["reported"]


def _mutate(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(4096) if chance.random() < 0.4 else chance.randrange(len(data))
    length = min(chance.choice((1, 4, 64, 4096)), len(data) - at)
    other = chance.randrange(len(data) - length)
    match chance.randrange(4):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + length] = chance.randbytes(length)
        case 2:
            data[at : at + length] = bytes(length)
        case _:
            data[at : at + length] = data[other : other + length]


def test_one_flipped_bit_is_never_silent(finished: Path, tmp_path: Path) -> None:
    chance = random.Random(9)
    good = finished.read_bytes()
    path = tmp_path / "flipped.moetrace"
    for _ in range(250):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        outcome(path)


def test_mutated_recordings_that_did_not_end(interrupted: Path, tmp_path: Path) -> None:
    chance = random.Random(10)
    path = tmp_path / "bad.moetrace"
    good, wal = interrupted.read_bytes(), interrupted.with_name("cut.moetrace-wal").read_bytes()
    for _ in range(100):
        both = [bytearray(good), bytearray(wal)]
        _mutate(both[chance.randrange(2)], chance)
        path.write_bytes(both[0])
        path.with_name("bad.moetrace-wal").write_bytes(both[1])
        path.with_name("bad.moetrace-shm").unlink(missing_ok=True)
        try:
            with TraceReader.open(path) as reader:
                for frame in reader.frames():
                    assert record(frame) == record(FRAMES[frame.position])
        except MoescopeError as error:
            assert error.code == ExitCode.TRACE


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_file_says_so(finished: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.moetrace"
    good = finished.read_bytes()
    path.write_bytes(good[: int(len(good) * share)])
    with pytest.raises(MoescopeError, match=r"cut\.moetrace: (size|expected a moescope trace)"):
        TraceReader.open(path)


def test_a_copy_without_its_wal_says_what_is_missing(interrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.moetrace"
    shutil.copy(interrupted, path)
    try:
        with TraceReader.open(path) as reader:
            assert "the -wal file beside it is missing" in reader.problems[0]
    except MoescopeError as error:
        assert "the -wal file beside it is missing" in error.message


def test_a_copy_made_at_once_is_not_silently_empty(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.moetrace", a_meta()) as writer:
        writer.append(a_frame())
        writer.flush()
        shutil.copy(tmp_path / "x.moetrace", tmp_path / "copy.moetrace")
    with pytest.raises(MoescopeError, match="-wal file beside it is missing") as caught:
        TraceReader.open(tmp_path / "copy.moetrace")
    assert "copy" in caught.value.hint


def edited(source: Path, target: Path, *statements: str) -> Path:
    shutil.copy(source, target)
    with sqlite3.connect(target, isolation_level=None) as db:
        db.execute("PRAGMA writable_schema=ON")
        for statement in statements:
            db.execute(statement)
    db.close()
    return target


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"


@pytest.mark.parametrize(
    "statements",
    [
        ("DROP TABLE chunk", f"CREATE VIEW chunk AS {ENDLESS}"),
        ("DROP TABLE tail", "CREATE TABLE tail(i, crc, b, more)"),
        ("CREATE TABLE extra(x)",),
        ("CREATE TRIGGER t AFTER INSERT ON meta BEGIN SELECT 1; END",),
        ("CREATE INDEX strange ON chunk(crc)",),
        ("DROP TABLE event",),
    ],
)
def test_another_schema_is_refused(finished: Path, tmp_path: Path, statements: Any) -> None:
    path = edited(finished, tmp_path / "x.moetrace", *statements)
    with pytest.raises(MoescopeError, match="tables: expected those of a trace"):
        TraceReader.open(path)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA application_id=7", "another SQLite file"),
        ("PRAGMA user_version=9", "format version: expected 1, found 9"),
        ("UPDATE meta SET v = '{}' WHERE k = 'meta'", "checksum differs"),
        ("DELETE FROM meta", "-wal file beside it is missing"),
    ],
)
def test_another_identity_is_refused(
    finished: Path, tmp_path: Path, statement: str, message: str
) -> None:
    path = edited(finished, tmp_path / "x.moetrace", statement)
    with pytest.raises(MoescopeError, match=message):
        TraceReader.open(path)


@pytest.mark.parametrize("content", [b"", b"layer,expert\n0,1\n", b"PAR1" * 40, b"\x00" * 200])
def test_what_is_no_trace_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.moetrace"
    path.write_bytes(content)
    with pytest.raises(MoescopeError, match="expected a moescope trace"):
        TraceReader.open(path)
    with pytest.raises(MoescopeError, match="found none"):
        TraceReader.open(tmp_path / "missing.moetrace")


# --- lies with a right checksum -------------------------------------------------------------------


def lie(source: Path, target: Path, name: str, change: Callable[[np.ndarray], Any]) -> Path:
    """Rewrite a column of the first chunk as a forger would, checksum included."""
    shutil.copy(source, target)
    with sqlite3.connect(target, isolation_level=None) as db:
        where = "WHERE name = ? AND first = 0"
        (blob,) = db.execute(f"SELECT b FROM chunk {where}", (name,)).fetchone()
        column = unpack(blob).copy()
        forged = pack(change(column))
        crc = checksum(name, 0, CHUNK, forged)
        db.execute(f"UPDATE chunk SET b = ?, crc = ? {where}", (forged, crc, name))
    db.close()
    return target


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(column: np.ndarray) -> np.ndarray:
        column.reshape(-1)[30] = value
        return column

    return change


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("expert_ids", put(16), "expected below 16"),
        ("expert_ids", put(-2), "expected at least -1"),
        ("runner_up", put(99), "expected below 16"),
        ("weights", put(np.nan), "weights: expected finite"),
        ("weights", put(np.inf), "weights: expected finite"),
        ("scores", put(np.nan), "scores: expected finite"),
        ("score_sum", put(np.nan), "score_sum: expected finite"),
        ("margin", put(np.nan), "margin: expected finite"),
        ("entropy", put(-np.inf), "entropy: expected finite"),
        ("logits", put(np.nan), "logits: expected finite"),
        ("phase", put(2), "phase: expected 0 or 1"),
        ("variant", put(1), "variant: expected one of"),
        ("position", put(-1), "position: expected at least 0"),
        ("alternatives", put(3), "alternatives: expected one list"),
        ("weights", lambda c: c[:, :2], "weights: expected shape"),
        ("weights", lambda c: c.astype(np.float64), "weights: expected float32"),
        ("shape", lambda c: c[:, :2], "shape: expected"),
        ("shape", lambda c: c * 0 + 3, "entropy: expected shape"),
        ("strings", lambda c: c[:-9], "not JSON"),
        ("strings", lambda c: np.frombuffer(b"[" * 200_000, np.uint8), "not JSON"),
        ("strings", lambda c: np.frombuffer(b'{"text": []}', np.uint8), "no text"),
    ],
)
def test_a_lie_is_found_and_the_other_chunk_stays_readable(
    finished: Path, tmp_path: Path, name: str, change: Any, fault: str
) -> None:
    path = lie(finished, tmp_path / "x.moetrace", name, change)
    with TraceReader.open(path) as reader:
        frames = list(reader.frames())
        assert [frame.position for frame in frames] == list(range(CHUNK, 60))
        assert [index for index, _ in reader.numbered(0, 50)] == list(range(CHUNK, 50))
        assert fault in reader.problems[0] and f"{CHUNK} frames skipped" in reader.problems[0]
        with pytest.raises(MoescopeError, match="frame 3 cannot be read"):
            reader.frame(3)
        assert np.isnan(reader.column("score_sum")[:CHUNK]).all()
        assert reader.column("score_sum").shape == (60, 4)


def test_a_lie_about_one_column_is_found_in_bulk_reads_too(finished: Path, tmp_path: Path) -> None:
    for name, value in (("expert_ids", 16), ("score_sum", np.nan), ("logits", np.inf)):
        path = lie(finished, tmp_path / f"{name}.moetrace", name, put(value))
        with TraceReader.open(path) as reader:
            reader.column(name)
            assert len(reader.problems) == 1


def test_invalid_rows_are_no_lie(tmp_path: Path) -> None:
    """NaN and -inf where the contract of `Routing` has them."""
    nan = np.full(4, np.nan, np.float32)
    excluded = a_frame(1).logits
    assert excluded is not None
    excluded = excluded.copy()
    excluded[:, 3] = -np.inf
    odd: list[Frame] = [
        a_frame(
            0,
            expert_ids=np.full((4, 2), -1, np.int16),
            weights=np.zeros((4, 2), np.float32),
            scores=np.full((4, 2), np.nan, np.float32),
            logits=np.full((4, 16), np.nan, np.float32),
            **{name: nan for name in ("score_sum", "mass", "entropy", "margin")},
            runner_up=np.full(4, -1, np.int16),
        ),
        a_frame(1, logits=excluded, margin=nan, runner_up=np.full(4, -1, np.int16)),
        # 0/0 in a normalisation without eps: the experts are chosen, the weights are not numbers
        a_frame(2, weights=np.full((4, 2), np.nan, np.float32), score_sum=nan),
    ]
    path = tmp_path / "x.moetrace"
    with TraceWriter(path, a_meta()) as writer:
        for frame in odd:
            writer.append(frame)
    with TraceReader.open(path) as reader:
        read = list(reader.frames())
        assert reader.problems == []
    assert [differences(a, b) for a, b in zip(odd, read, strict=True)] == [[], [], []]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("routers", "many", "meta.routers: expected a list"),
        ("routers", [{"layer": -1}], r"meta.routers\[0\].layer: expected a whole number"),
        ("routers", [{"layer": 1, "num_experts": 10**9}], r"num_experts: expected"),
        ("record", "everything", "meta.record: expected ids or weights or logits"),
        ("engine", [], "meta.engine: expected an object"),
        ("prompt_ids", [1, "2"], "meta.prompt_ids: expected a list"),
        ("version", 2, "meta.version: expected 1, found 2"),
        ("absent", ["\x1b[2J"], "meta.absent: expected fields"),
    ],
)
def test_forged_meta_names_the_field(
    finished: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    import json

    path = tmp_path / "x.moetrace"
    shutil.copy(finished, path)
    with sqlite3.connect(path, isolation_level=None) as db:
        rows = dict(db.execute("SELECT k, v FROM meta WHERE k <> 'crc'"))
        rows["meta"] = json.dumps(json.loads(rows["meta"]) | {field: value})
        db.execute("UPDATE meta SET v = ? WHERE k = 'meta'", (rows["meta"],))
        db.execute("UPDATE meta SET v = ? WHERE k = 'crc'", (meta_checksum(rows),))
    db.close()
    with pytest.raises(MoescopeError, match=message) as caught:
        TraceReader.open(path)
    assert caught.value.message.isprintable()


def test_vectors_that_expand_too_far_are_refused(tmp_path: Path) -> None:
    zeros = np.zeros(15 << 20, np.float32)  # 60 MiB, some 250 kB stored
    path = tmp_path / "x.moetrace"
    tensors = {router: {"correction_bias": zeros} for router in range(5)}
    TraceWriter(path, a_meta(router_tensors=tensors)).close()
    assert path.stat().st_size < 3_000_000
    with pytest.raises(MoescopeError, match="router_tensors: 'correction_bias' declares"):
        TraceReader.open(path)


def test_frames_that_a_file_cannot_hold_are_not_counted(finished: Path, tmp_path: Path) -> None:
    path = edited(
        finished, tmp_path / "x.moetrace", f"UPDATE chunk SET first = {2**40} WHERE first = {CHUNK}"
    )
    with TraceReader.open(path) as reader:
        assert reader.count == CHUNK and len(reader.keys()) == CHUNK
        assert "impossible place" in reader.problems[0]
    gap = f"UPDATE chunk SET first = first + 5 WHERE first = {CHUNK}"
    with TraceReader.open(edited(finished, tmp_path / "y.moetrace", gap)) as reader:
        assert len(list(reader.frames())) == CHUNK and reader.count == 65
        assert "chunk at frame 40: is missing; 5 frames skipped" in reader.problems


def test_nothing_but_reading_our_tables_is_allowed(finished: Path) -> None:
    db, _ = database.open_reading(finished, immutable=True)
    for statement in (
        "SELECT count(*) FROM meta",
        "SELECT sql FROM sqlite_master",
        "PRAGMA user_version",
        "DELETE FROM meta",
        "ATTACH 'x' AS y",
        ENDLESS,
    ):
        with pytest.raises(sqlite3.DatabaseError):
            db.execute(statement).fetchall()
    db.close()
