"""Comparing lanes: a slow twin, where they part, what compounds, runs on the toy model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.diagnosis.causes import LogitsJudge
from moescope.diagnosis.compare import (
    Pairing,
    compare_lanes,
    first_divergence,
)
from moescope.diagnosis.compare_run import run_compare, specs_under, units_under
from moescope.diagnosis.rows import decisions, of_frame
from moescope.engine.protocol import Generate, Sampling
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import Frame
from tests.engine.fake import FakeTokenizer, fake

LAYERS = [0, 2, 5]
PROMPT = Generate("once upon a time", sampling=Sampling(temperature=0.7, max_new_tokens=30))


def frame(lane: int, position: int, ids: Any, weights: Any = None, **fields: Any) -> Frame:
    expert_ids = np.asarray(ids, np.int16)
    given = np.ones(expert_ids.shape) if weights is None else np.asarray(weights)
    held = np.where(expert_ids >= 0, given, 0).astype(np.float32)
    each = np.ones(len(expert_ids), np.float32)
    return Frame(
        **{
            "sequence": 0,
            "lane": lane,
            "position": position,
            "token_id": position,
            "text": "",
            "phase": 1,
            "variant": f"v{lane}",
            "expert_ids": expert_ids,
            "score_sum": held.sum(1),
            "mass": each,
            "entropy": each,
            "margin": each * 0.25,
            "runner_up": np.zeros(len(expert_ids), np.int16),
            "weights": held,
            **fields,
        }
    )


@st.composite
def picks(draw: st.DrawFn, width: int) -> tuple[list[int], list[float]]:
    """One router's decision: distinct experts, then unused slots; none at all is an invalid row."""
    ids = draw(st.lists(st.integers(0, 6), unique=True, max_size=width))
    weights = draw(st.lists(st.floats(0, 1, width=32), min_size=width, max_size=width))
    return ids + [-1] * (width - len(ids)), weights


@given(a=st.lists(picks(3), min_size=3, max_size=3), b=st.lists(picks(4), min_size=3, max_size=3))
def test_decisions_against_a_slow_twin(a: Any, b: Any) -> None:
    left = frame(0, 0, [ids for ids, _ in a], [weights for _, weights in a])
    right = frame(1, 0, [ids for ids, _ in b], [weights for _, weights in b])
    found = {name: rows[0] for name, rows in decisions(of_frame(left), of_frame(right)).items()}
    for router in range(3):
        chosen = []
        for side in (left, right):
            assert side.weights is not None
            row = zip(side.expert_ids[router].tolist(), side.weights[router], strict=True)
            chosen.append({expert: float(w) for expert, w in row if expert >= 0})
        one, two = chosen
        valid = bool(one and two)
        both, either = set(one) & set(two), set(one) | set(two)
        expected = {
            "tokens": valid,
            "same_set": valid and set(one) == set(two),
            "same_order": valid and list(one) == list(two),
            "overlap": len(both) / max(len(one), len(two)) if valid else 0,
            "same_top1": valid and next(iter(one)) == next(iter(two)),
            "weight_tokens": valid,
            "weight_difference": sum(abs(one.get(e, 0) - two.get(e, 0)) for e in either)
            / len(either)
            if valid
            else 0,
            "score_sum_a": left.score_sum[router] if valid else 0,
            "score_sum_b": right.score_sum[router] if valid else 0,
        }
        for name, value in expected.items():
            assert found[name][router] == pytest.approx(float(value), abs=1e-5), name


def lanes_that_part() -> dict[int, list[Frame]]:
    """Same routing at 0; another set in router 1 at 1; other ids from 2 on."""
    same = [[0, 1], [2, 3], [4, 5]]
    other = [[0, 1], [2, 6], [7, 5]]
    first = [frame(0, p, same) for p in range(4)]
    second = [
        frame(1, 0, [[1, 0], [2, 3], [4, 5]], kl=0.5, top1_agrees=True),
        frame(1, 1, other, kl=1.5, top1_agrees=False),
        frame(1, 2, other, token_id=99, kl=9.0),
        frame(1, 3, same),
    ]
    return {0: first, 1: second}


def test_where_lanes_part_and_what_compounds() -> None:
    (found,) = compare_lanes(lanes_that_part(), LAYERS)
    assert (found.variant_a, found.variant_b, found.tokens) == ("v0", "v1", 4)
    assert found.ids_part_at == 2
    first = found.first_divergence
    assert first is not None and (first.position, first.router, first.layer) == (1, 1, 2)
    assert first.margin_a == 0.25 and (first.experts_a, first.experts_b) == ((2, 3), (2, 6))
    assert found.same_ids.all.tokens == 2 and found.compounded.all.tokens == 2
    assert found.same_ids.all.same_set == pytest.approx(4 / 6)
    assert found.same_ids.all.same_order == pytest.approx(3 / 6)
    assert [r.same_set for r in found.same_ids.routers] == [1.0, 0.5, 0.5]
    assert (found.kl_tokens, found.kl_mean, found.kl_max) == (2, 1.0, 1.5)
    assert found.top1_agrees == 0.5
    assert first_divergence(lanes_that_part(), LAYERS) == first
    json.dumps(found.to_json(), allow_nan=False)


@given(st.permutations(range(8)))
def test_frames_may_come_in_any_order_of_lanes(order: list[int]) -> None:
    """What a fork does: one lane is far ahead. Within a lane, positions only rise."""
    lanes = lanes_that_part()
    expected = compare_lanes(lanes, LAYERS)[0]
    waiting = {lane: iter(frames) for lane, frames in lanes.items()}
    pairing = Pairing(0, 1, LAYERS)
    for number in order:
        pairing.feed(next(waiting[number % 2]))
        pairing.feed(frame(5, 0, [[0]] * 3))  # of no interest
    assert pairing.result() == expected


def test_a_shared_prefix_and_missing_fields_are_not_compared() -> None:
    lanes = lanes_that_part()
    lanes[1] = [replace(f, weights=None) for f in lanes[1][2:]]
    (found,) = compare_lanes(lanes, LAYERS)
    assert found.tokens == 2 and found.same_ids.all.tokens == 0
    assert found.compounded.all.weight_difference is None and found.same_ids.all.overlap is None
    assert found.first_divergence is None and found.kl_mean is None
    assert compare_lanes({}, LAYERS) == ()


def test_an_invalid_row_counts_nowhere() -> None:
    bad = frame(1, 0, [[0, 1], [-1, -1], [4, 5]], score_sum=np.array([1, np.nan, 1], np.float32))
    (found,) = compare_lanes({0: [frame(0, 0, [[0, 1], [2, 3], [4, 5]])], 1: [bad]}, LAYERS)
    assert found.first_divergence is None
    assert [r.tokens for r in found.same_ids.routers] == [1, 0, 1]
    assert found.same_ids.all.same_set == 1.0
    json.dumps(found.to_json(), allow_nan=False)


def test_free_lanes_of_a_run() -> None:
    seen: list[Frame] = []
    expressions = ["trained", "softmax_over_selected", "norm_topk_prob=false"]
    run = run_compare(fake(), FakeTokenizer(), expressions, PROMPT, watch=seen.append)
    assert [lane.variant for lane in run.lanes] == expressions
    changed, equal = run.comparisons
    assert equal.ids_part_at is None and equal.first_divergence is None
    assert equal.same_ids.all.same_order == 1.0 and equal.same_ids.all.weight_difference == 0.0
    assert run.lanes[0].token_ids == run.lanes[2].token_ids
    a, b = ((*lane.prompt_ids, *lane.token_ids) for lane in run.lanes[:2])
    parted = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert changed.ids_part_at == parted and changed.compounded.all.tokens > 0
    assert changed.first_divergence is not None and changed.first_divergence.position <= parted
    assert changed.same_ids.all.score_sum_b == pytest.approx(1.0)
    assert changed.kl_tokens == parted
    by_lane = {n: [f for f in seen if f.lane == n] for n in range(3)}
    judge = LogitsJudge(specs_under(fake()), [{}] * 3)
    units = units_under(specs_under(fake()))
    assert compare_lanes(by_lane, [0, 1, 2], judge, units) == run.comparisons
    first = changed.first_divergence
    assert (first.margin_unit_a, first.margin_unit_b) == ("score", "logit")
    assert set(changed.margin_units_a) == {"score"} and set(changed.margin_units_b) == {"logit"}
    json.dumps(run.to_json(), allow_nan=False)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 100))
def test_teacher_forced_lanes_never_part(seed: int) -> None:
    expressions = ["trained", "softmax_over_selected", "num_experts_per_tok+1"]
    run = run_compare(
        fake(seed=seed), None, expressions, Generate(prompt_ids=(1, 2, 3)), force_ids=[5, 6, 7] * 8
    )
    for found in run.comparisons:
        assert found.ids_part_at is None and found.compounded.all.tokens == 0
        assert found.tokens == found.kl_tokens == 27
    led = run_compare(fake(seed=seed), FakeTokenizer(), expressions, PROMPT, teacher_forced=True)
    assert len({lane.token_ids for lane in led.lanes}) == 1
    assert all(found.ids_part_at is None for found in led.comparisons)


def test_a_recording_that_stopped_is_told() -> None:
    class Full:
        meta, acknowledged, dropped_logits = SimpleNamespace(record="weights"), 7, 0

        def extend(self, _: Any) -> None:
            raise MoescopeError("x.moetrace: disk full", code=ExitCode.OUTPUT)

        def event(self, _: Any) -> None: ...

        def close(self) -> None: ...

    run = run_compare(fake(), FakeTokenizer(), ["trained", "logits_bf16"], PROMPT, writer=Full())
    assert run.stopped == "x.moetrace: disk full" and run.to_json()["stopped"] == run.stopped
    assert all(lane.token_ids for lane in run.lanes)
