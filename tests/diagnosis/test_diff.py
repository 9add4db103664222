"""Diff: what two traces of one text share, and what they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope import cli
from moescope.diagnosis.diff import diff
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import RouterInfo, TraceEvent
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceWriter
from tests.trace.samples import a_frame, a_meta


def trace_of(count: int = 12, *, lane: int = 0, change: Any = None, **meta: Any) -> MemoryTrace:
    trace = MemoryTrace(a_meta(**meta))
    for position in range(count):
        frame = a_frame(position)
        frame = replace(frame, lane=lane, token_id=position)
        trace.append(frame if change is None else change(frame))
    return trace


def test_a_trace_is_like_itself() -> None:
    found = diff(trace_of(), trace_of())
    (lane,) = found.lanes
    assert found.same and lane.same and lane.comparison.tokens == 12 and lane.weights_apart == 0
    assert found.conditions == {} and lane.only_in_a == lane.only_in_b == lane.unordered == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_a_flip_an_order_and_a_weight_are_told_apart() -> None:
    def flipped(frame: Any) -> Any:
        ids = frame.expert_ids.copy()
        ids[2, 1] = next(e for e in range(16) if e not in ids[2])
        return replace(frame, expert_ids=ids) if frame.position == 7 else frame

    def swapped(frame: Any) -> Any:
        ids, weights = frame.expert_ids[:, ::-1].copy(), frame.weights[:, ::-1].copy()
        return replace(frame, expert_ids=ids, weights=weights)

    def heavier(frame: Any) -> Any:
        return replace(frame, weights=frame.weights + np.float32(2e-3))

    by_flip = diff(trace_of(), trace_of(change=flipped))
    first = by_flip.lanes[0].comparison.first_divergence
    assert not by_flip.same and first is not None and (first.position, first.layer) == (7, 2)
    by_order = diff(trace_of(), trace_of(change=swapped)).lanes[0]
    assert not by_order.same and by_order.unordered == 12 * 4 and by_order.weights_apart < 1e-7
    assert by_order.comparison.flips == 0
    by_weight = diff(trace_of(), trace_of(change=heavier)).lanes[0]
    assert not by_weight.same and by_weight.weights_apart == pytest.approx(2e-3, rel=1e-2)
    assert diff(trace_of(), trace_of(change=heavier), tolerance=0.01).same


def test_tokens_that_only_one_has_and_texts_that_part() -> None:
    shorter = diff(trace_of(12), trace_of(9)).lanes[0]
    assert (shorter.only_in_a, shorter.only_in_b, shorter.comparison.tokens) == (3, 0, 9)
    assert not shorter.same and shorter.comparison.same_ids.all.same_set == 1.0

    def other(frame: Any) -> Any:
        return replace(frame, token_id=99) if frame.position >= 5 else frame

    parted = diff(trace_of(), trace_of(change=other)).lanes[0]
    assert parted.comparison.ids_part_at == 5 and not parted.same


def test_lanes_and_sequences_are_matched() -> None:
    a, b = trace_of(), trace_of(lane=1)
    with pytest.raises(MoescopeError, match="share none") as caught:
        diff(a, b)
    assert caught.value.code == ExitCode.TRACE
    found = diff(a, b, lanes=(0, 1))
    assert found.same and found.lanes[0].lanes == (0, 1)
    for position in range(4):
        a.append(a_frame(position, sequence=1))
    both = diff(a, trace_of())
    assert both.lanes_only_in_a == ((1, 0),) and both.same, "what both have is the same"


def test_layers_are_matched_by_number() -> None:
    ordinal = trace_of(routers=4)
    ordinal.meta = replace(
        ordinal.meta, routers=tuple(RouterInfo(n + 2, 16, 0, 2, {}) for n in range(4))
    )
    found = diff(trace_of(), ordinal)
    assert found.routers_only_in_a == ((0, "mlp"), (1, "mlp")) and not found.same
    assert found.routers_only_in_b == ((4, "mlp"), (5, "mlp"))
    assert found.lanes[0].comparison.layers == (2, 3)
    ordinal.meta = replace(
        ordinal.meta, routers=tuple(RouterInfo(n + 20, 16, 0, 2, {}) for n in range(4))
    )
    with pytest.raises(MoescopeError, match="share no layer: 0, 1, 2, 3 and 20, 21, 22, 23"):
        diff(trace_of(), ordinal)


def test_how_traces_were_made_is_told() -> None:
    other = trace_of(engine={"name": "vllm", "dtype": "bfloat16"}, rank_ordered=False)
    found = diff(trace_of(engine={"name": "moescope", "dtype": "bfloat16"}), other)
    assert found.conditions == {
        "rank_ordered": (True, False),
        "engine name": ("moescope", "vllm"),
    }


def test_long_lanes_and_forks() -> None:
    long = trace_of(1100)
    assert diff(long, long).lanes[0].comparison.tokens == 1100
    forked = trace_of(20)
    forked.event(TraceEvent("fork", {"expression": "x", "fork_of": 0}, lane=1, position=15))
    for position in range(15, 20):
        forked.append(replace(a_frame(position), lane=1, token_id=position))
    assert diff(forked, forked, lanes=(0, 1)).same


def test_the_command(capsys: Any, tmp_path: Path) -> None:
    def written(name: str, trace: MemoryTrace) -> str:
        with TraceWriter(tmp_path / name, trace.meta) as writer:
            for frame in trace.frames():
                writer.append(frame)
        return str(tmp_path / name)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["diff", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    a, b = written("a.moetrace", trace_of()), written("b.moetrace", trace_of(8))
    assert run(a, a)[0] == 0
    code, out, _ = run(a, b)
    assert code == ExitCode.FOUND and "different routing" in out and "4 only in A" in out
    code, out, _ = run(a, b, "--json")
    assert code == 1 and json.loads(out)["lanes"][0]["only_in_a"] == 4
    assert run(a, a, "--lanes", "A", "B")[0] == ExitCode.TRACE
    assert run(a, str(tmp_path / "absent"))[0] == ExitCode.TRACE
    assert cli.run(["convert", a, str(tmp_path / "a.jsonl")]) == 0
    assert run(a, str(tmp_path / "a.jsonl"))[0] == 0
    (tmp_path / "cut.moetrace").write_bytes(Path(a).read_bytes()[:6000])
    code, _, err = run(a, str(tmp_path / "cut.moetrace"))
    assert code == ExitCode.TRACE and "Traceback" not in err
