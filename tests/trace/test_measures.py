"""Measures against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace import measures
from moescope.trace.memory import MemoryTrace
from tests.trace.samples import a_frame, a_meta

IDS = hnp.arrays(
    np.int16, st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)),
    elements=st.integers(-1, 6),
)  # fmt: skip


@given(IDS)
@settings(max_examples=60, deadline=None)
def test_loads_are_counts(ids: np.ndarray) -> None:
    load = measures.expert_load(ids, 7)
    for router in range(ids.shape[1]):
        counted = Counter(int(e) for e in ids[:, router].ravel() if e >= 0)
        assert load[router].tolist() == [counted[e] for e in range(7)]
        dead = measures.dead_experts(load)[router]
        assert dead.sum() == (7 - len(counted) if counted else 0)
        share = measures.relative_load(load)[router]
        if counted:
            assert share.sum() == pytest.approx(7)
        else:
            assert np.isnan(share).all()


@given(IDS)
@settings(max_examples=60, deadline=None)
def test_picks_that_return_and_picks_that_are_new(ids: np.ndarray) -> None:
    shared, fresh = measures.shared_picks(ids), measures.first_uses(ids, 7)
    for router in range(ids.shape[1]):
        seen: set[int] = set()
        for t in range(len(ids)):
            now = set(ids[t, router].tolist()) - {-1}
            assert fresh[t, router] == len(now - seen)
            seen |= now
            if t and len(now) == (ids[t, router] >= 0).sum():  # routers pick an expert once
                assert shared[t - 1, router] == len(now & set(ids[t - 1, router].tolist()))


def test_balance_and_agreement() -> None:
    even = np.array([[[0, 1]], [[2, 3]]])
    assert measures.load_variation(measures.expert_load(even, 4)).tolist() == [0]
    one = np.zeros((3, 1, 1), np.int16)
    assert measures.load_variation(measures.expert_load(one, 4)) == pytest.approx(3**0.5)
    turned = np.array([[[1, 0]], [[2, 1]]])
    assert measures.agreement(even, turned).tolist() == [0.5]
    assert measures.agreement(even, np.array([[[0, -1]], [[2, 3]]])).tolist() == [0.5]
    assert np.isnan(measures.agreement(even[:0], even[:0])).all()


def test_near_ties_do_not_count_missing_margins() -> None:
    margin = np.array([[0.0, 0.1, np.nan], [0.5, 0.5, 0.5]])
    assert measures.near_ties(margin, 0.05).tolist() == [1, 0]


def test_percentiles_leave_invalid_rows_out() -> None:
    sums = np.array([[0.1, np.nan], [0.3, np.nan], [np.nan, np.nan]], np.float32)
    found = measures.score_sum_percentiles(sums, (0, 50, 100))
    assert found[0] == pytest.approx([0.1, 0.2, 0.3]) and np.isnan(found[1]).all()


def allowed(**policy: object) -> object:
    spec = RouterSpec(RouterPolicy(2, **policy), RouterWiring(16))  # type: ignore[arg-type]
    return spec.allowed_score_sum()


@pytest.mark.parametrize(
    ("policy", "right", "wrong"),
    [
        ({"norm_topk_prob": True}, [1.0, 1 - 1e-6], [0.6, 1.01, 0.0]),
        ({"norm_topk_prob": True, "routed_scaling_factor": 2.5}, [2.5], [1.0]),
        ({}, [0.4, 0.999, 1.0], [1.2, 0.0, -0.1]),
        ({"scoring_func": "sigmoid"}, [1.7, 0.2], [2.3, -1.0]),
        ({"weights_from": "logits"}, [-3.0, 0.0, 9.0], []),
    ],
)
def test_sums_the_spec_does_not_allow_are_marked(
    policy: dict[str, object], right: list[float], wrong: list[float]
) -> None:
    sums = np.array([right + wrong], np.float32).T
    marks = measures.sum_violations(sums, [allowed(**policy)])  # type: ignore[list-item]
    assert marks[:, 0].tolist() == [False] * len(right) + [True] * len(wrong)


def test_the_tolerance_follows_the_dtype_of_the_weights() -> None:
    rounded = np.array([[1 - 2**-8], [np.nan]], np.float32)
    assert not measures.sum_violations(rounded, [1.0], dtype="bfloat16").any()
    assert measures.sum_violations(rounded, [1.0], dtype="float32").tolist() == [[True], [False]]


def test_measures_read_what_traces_give() -> None:
    trace = MemoryTrace(a_meta())
    for position in range(40):
        trace.append(a_frame(position))
    load = measures.expert_load(trace.column("expert_ids"), 16)
    assert load.sum(axis=1).tolist() == [80] * 4
    assert not measures.sum_violations(trace.column("score_sum"), [(0.0, 1.0)] * 4).any()
