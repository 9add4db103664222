"""What is recorded is what is read: every field, every bit, whatever the shape of the frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.errors import ExitCode, MoescopeError
from moescope.trace.chunk import ChunkStrings, columns_of, frames_of
from moescope.trace.columns import ColumnError, pack, unpack
from moescope.trace.fold import columns_of_records
from moescope.trace.frames import Frame, RecordLevel, TraceEvent, TraceMeta
from moescope.trace.memory import MemoryTrace
from moescope.trace.record import frame_of, record
from moescope.trace.store import TraceReader, TraceWriter
from tests.trace.samples import a_frame, a_meta, differences, record_trace, same_bits

FLOAT32 = st.floats(width=32)  # NaN and infinities included
TEXT = st.text(st.characters(), max_size=8)  # surrogates included


def floats(draw: Any, *shape: int) -> np.ndarray:
    bits = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(bits)
    return rng.integers(0, 2**32, size=shape, dtype=np.uint32).view(np.float32)  # any bit pattern


@st.composite
def odd_frames(draw: Any) -> Frame:
    """Any shapes, any float bits, any field absent: nothing a recorder has to find sensible."""
    routers, k, experts = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(4, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(-1, experts, size=shape).astype(np.int16)

    def maybe(value: Any) -> Any:
        return draw(st.one_of(st.none(), st.just(value)))

    shadow = {
        name: {"expert_ids": ids(routers, k + 1)}
        | ({"weights": floats(draw, routers, k + 1)} if draw(st.booleans()) else {})
        | ({"score_sum": floats(draw, routers)} if draw(st.booleans()) else {})
        for name in draw(st.lists(TEXT, max_size=2, unique=True))
    }
    return Frame(
        sequence=draw(st.integers(0, 2**31 - 1)),
        lane=draw(st.integers(0, 7)),
        position=draw(st.integers(0, 2**31 - 1)),
        token_id=draw(st.integers(-1, 2**31 - 1)),
        text=draw(TEXT),
        phase=draw(st.integers(0, 1)),
        variant=draw(TEXT),
        expert_ids=ids(routers, k),
        score_sum=floats(draw, routers),
        mass=floats(draw, routers),
        entropy=floats(draw, routers),
        margin=floats(draw, routers),
        runner_up=ids(routers),
        weights=maybe(floats(draw, routers, k)),
        scores=maybe(floats(draw, routers, k)),
        logits=maybe(floats(draw, routers, experts)),
        logprob=draw(st.one_of(st.none(), FLOAT32)),
        rank=draw(st.one_of(st.none(), st.integers(1, 2**31 - 1))),
        alternatives=tuple(draw(st.lists(st.tuples(st.integers(0, 9), FLOAT32), max_size=8))),
        kl=draw(st.one_of(st.none(), FLOAT32)),
        top1_agrees=draw(st.one_of(st.none(), st.booleans())),
        shadow=maybe(shadow),
    )


@given(odd_frames(), st.lists(odd_frames(), max_size=2), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_columns_of_records_are_those_of_frames(
    frame: Frame, others: list[Frame], shadowless: bool, data: st.DataObject
) -> None:
    """Records that are alike, and some that are not."""
    if shadowless:
        frame = replace(frame, shadow=None)
    like = st.builds(
        lambda position, lane, text, variant, rank: replace(
            frame, position=position, lane=lane, text=text, variant=variant, rank=rank
        ),
        *(st.integers(0, 9), st.integers(0, 2), TEXT, TEXT, st.none() | st.integers(1, 9)),
    )
    frames = [*others, *data.draw(st.lists(like, min_size=1, max_size=4))]
    blobs = [record(one) for one in frames]
    found, wanted = columns_of_records(blobs), columns_of([frame_of(blob) for blob in blobs])
    assert sorted(found) == sorted(wanted)
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype, name
        assert pack(found[name]) == pack(column), name


@given(st.lists(odd_frames(), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_records_and_chunks_keep_every_bit(frames: list[Frame]) -> None:
    tail = [frame_of(record(frame)) for frame in frames]
    assert [differences(a, b) for a, b in zip(frames, tail, strict=True)] == [[]] * len(frames)

    columns = {name: unpack(pack(column)) for name, column in columns_of(tail).items()}
    strings = ChunkStrings(columns["strings"], len(frames))
    chunk = frames_of(columns, strings, 0, len(frames))
    assert [differences(a, b) for a, b in zip(frames, chunk, strict=True)] == [[]] * len(frames)


@given(
    st.lists(odd_frames(), min_size=1, max_size=4), st.sampled_from(["ids", "weights", "logits"])
)
@settings(max_examples=15, deadline=None)
def test_a_file_keeps_what_its_level_records(
    tmp_path_factory: pytest.TempPathFactory, frames: list[Frame], level: RecordLevel
) -> None:
    path = tmp_path_factory.mktemp("trace") / "odd.moetrace"
    with TraceWriter(path, TraceMeta(record=level)) as writer:
        for frame in frames:
            writer.append(frame)
    dropped = {
        "ids": {"weights", "scores", "logits", "shadow"},
        "weights": {"logits"},
        "logits": set(),
    }
    with TraceReader.open(path, foreign=False) as reader:
        read = list(reader.frames())
    assert len(read) == len(frames)
    for before, after in zip(frames, read, strict=True):
        assert set(differences(before, after)) <= dropped[level]
        if level == "ids":
            assert after.weights is None and after.scores is None
        if level != "logits":
            assert after.logits is None


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_column_are_refused(data: bytes) -> None:
    good = pack(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    for blob in (data, good[: len(data)], good[:3] + data):
        try:
            array = unpack(blob, limit=1 << 16)
        except ColumnError:
            continue
        assert array.nbytes <= 1 << 16


def test_a_column_that_expands_too_far_is_refused() -> None:
    bomb = pack(np.zeros(1 << 20, dtype=np.uint8))
    assert len(bomb) < 5000
    with pytest.raises(ColumnError, match="limit 1,000"):
        unpack(bomb, limit=1000)
    lying = bomb[:2] + (10).to_bytes(4, "little") + bomb[6:]  # says 10 bytes, expands to a million
    with pytest.raises(ColumnError, match="declared size"):
        unpack(lying)


def test_many_chunks_and_lanes_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "two.moetrace"
    frames = [a_frame(p, lane=lane, k=2 + lane) for p in range(400) for lane in (0, 1)]
    with TraceWriter(path, a_meta(k=3)) as writer:
        for frame in frames:
            writer.append(frame)
        writer.flush()
        assert writer.acknowledged == 800
    assert [p.name for p in tmp_path.iterdir()] == ["two.moetrace"]
    with TraceReader.open(path) as reader:
        assert (reader.count, reader.lanes, reader.problems) == (800, (0, 1), [])
        assert reader.complete
        assert all(not differences(a, b) for a, b in zip(frames, reader.frames(), strict=True))
        assert not differences(reader.frame(513), frames[513])
        window = list(reader.frames(250, 262))
        assert [f.position for f in window] == [f.position for f in frames[250:262]]
        assert reader.column("expert_ids").shape == (800, 4, 3)
        assert np.array_equal(reader.column("position", 254, 258), [127, 127, 128, 128])
        assert reader.find(1, 300) == 601
        with pytest.raises(IndexError):
            reader.frame(800)


def test_meta_and_events_travel(tmp_path: Path) -> None:
    path = tmp_path / "meta.moetrace"
    bias = np.linspace(-1, 1, 16, dtype=np.float32)
    meta = a_meta(
        engine={"name": "torch", "dtype": "bfloat16"},
        sampling={"seed": 3},
        prompt_ids=(1, 2, 3),
        router_tensors={2: {"correction_bias": bias}},
    )
    events = [
        TraceEvent("prompt", {"text": "né\ud800", "ids": [1, 2, 3]}),
        TraceEvent("variant", {"expression": "trained"}, lane=1, position=12),
        TraceEvent("pieces", {"pieces": {"5": " a", "6": "\x1b[2J"}}),
    ]
    with TraceWriter(path, meta) as writer:
        for event in events:
            writer.event(event)
        writer.append(a_frame())
    with TraceReader.open(path) as reader:
        assert reader.events() == events
        assert reader.pieces() == {5: " a", 6: "\x1b[2J"}
        assert reader.meta.routers == meta.routers
        assert reader.meta.models == meta.models
        assert (reader.meta.engine, reader.meta.sampling) == (meta.engine, meta.sampling)
        assert reader.meta.prompt_ids == (1, 2, 3)
        assert same_bits(reader.meta.router_tensors[2]["correction_bias"], bias)


def test_redaction_leaves_no_token_behind(tmp_path: Path) -> None:
    path = tmp_path / "quiet.moetrace"
    canary = "canary-4242"
    with TraceWriter(path, a_meta(redacted=True, prompt_ids=(4242, 4242))) as writer:
        writer.event(TraceEvent("prompt", {"text": canary, "ids": [4242]}))
        writer.event(TraceEvent("pieces", {"pieces": {"4242": canary}}))
        writer.event(TraceEvent("turn", {"text": canary, "tokens": 1}))
        for position in range(300):
            frame = a_frame(position, text=canary, token_id=4242, alternatives=((4242, -1.0),))
            writer.append(frame)
        writer.flush()
        raw = path.read_bytes() + path.with_name("quiet.moetrace-wal").read_bytes()
        assert canary.encode() not in raw
    with TraceReader.open(path) as reader:
        assert [event.kind for event in reader.events()] == ["turn"]
        assert reader.events()[0].data == {"tokens": 1}
        frame = reader.frame(7)
        assert (frame.token_id, frame.text, frame.alternatives) == (-1, "", ())
        assert reader.meta.prompt_ids is None


def test_frames_that_do_not_fit_together_are_our_own_mistake(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.moetrace", a_meta()) as writer:
        with pytest.raises(ValueError, match="weights"):
            writer.append(a_frame(weights=np.zeros((4, 9), np.float32)))
        with pytest.raises(ValueError, match="a frame of 5 routers"):
            writer.append(a_frame(routers=5))
        with pytest.raises(ValueError, match="arrays: expected"):
            writer.extend([(a_frame(), (b"\0" * 10, b"\0" * 16))])
        writer.append(a_frame())


def test_memory_and_file_answer_alike(tmp_path: Path) -> None:
    frames = [a_frame(p, lane=lane) for p in range(20) for lane in (0, 2)]
    path = tmp_path / "x.moetrace"
    memory = MemoryTrace(a_meta())
    with TraceWriter(path, a_meta()) as writer:
        for target in (memory, writer):
            for frame in frames:
                target.append(frame)
            target.event(TraceEvent("note", {"text": "end"}))
    with TraceReader.open(path) as reader:
        assert (memory.count, memory.lanes) == (reader.count, reader.lanes)
        for name in ("score_sum", "expert_ids", "logits", "rank", "kl", "position", "phase"):
            assert same_bits(memory.column(name, 3, 33), reader.column(name, 3, 33)), name
        assert np.array_equal(memory.keys(), reader.keys())
        assert memory.events() == reader.events()
        assert np.array_equal(memory.lane_frames(2), reader.lane_frames(2))


def test_a_fork_finds_what_it_shares(tmp_path: Path) -> None:
    trace = MemoryTrace(a_meta())
    for position in range(10):
        trace.append(a_frame(position))
    trace.event(TraceEvent("fork", {"fork_of": 0}, lane=1, position=6))
    for position in range(10, 12):
        trace.append(a_frame(position))
    for position in range(6, 9):
        trace.append(a_frame(position, lane=1))
    assert trace.lane_frames(0).tolist() == list(range(12))
    assert trace.lane_frames(1).tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14]
    assert trace.find(1, 3) == 3 and trace.find(1, 7) == 13 and trace.find(1, 9) is None
    trace.append(a_frame(0, lane=1, sequence=1))
    assert trace.lane_frames(1).tolist() == [15]
    assert trace.lane_frames(1, 0).tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14]


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    record_trace(path, 5)
    with pytest.raises(MoescopeError, match="already exists") as caught:
        TraceWriter(path, a_meta())
    assert caught.value.code == ExitCode.OUTPUT
    with TraceWriter(path, a_meta(), force=True) as writer:
        writer.append(a_frame())
    with TraceReader.open(path) as reader:
        assert reader.count == 1


def test_an_empty_private_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.moetrace"
    path.touch(0o600)
    with TraceWriter(path, a_meta()) as writer:
        writer.append(a_frame())
        writer.flush()
        assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}
    assert path.stat().st_mode & 0o777 == 0o600
