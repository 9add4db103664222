"""Sampling: ties, transformers' filters, numbers that repeat, and rows that are no rows."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moescope.engine.protocol import Sampling
from moescope.engine.sampling import (
    Expectation,
    candidates,
    check,
    choose,
    divergence,
    expectations,
    expectations_of,
    largest,
    uniform,
)
from moescope.errors import MoescopeError
from moescope.kernels import native_ops

ROWS = arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 7.0]),
)


def expectation(row: object) -> Expectation:
    found = Expectation.of(np.asarray(row, np.float32))
    assert found is not None
    return found


def test_greedy_takes_the_lower_id_of_equal_logits() -> None:
    assert choose(expectation([0, 3, 1, 3]), Sampling(), 5) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_distribution_is_none(bad: float) -> None:
    assert Expectation.of(np.array([0.0, bad, 1.0], np.float32)) is None
    assert Expectation.of(np.full(4, -np.inf, np.float32)) is None


TIES = st.sampled_from([-np.inf, np.nan, np.inf, -3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 7.0])


@given(
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 200)), elements=TIES)
    | arrays(np.float32, (2, 150), elements=st.floats(-80, 80, width=32))
)
def test_expectations_of_many_rows_are_those_of_each(rows: np.ndarray) -> None:
    for row, found in zip(rows, expectations(rows), strict=True):
        wanted = Expectation.of(row)
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.log_sum == pytest.approx(wanted.log_sum, abs=1e-5)
            ids = [[i for i, _ in e.likeliest()] for e in (found, wanted)]
            assert ids[0] == ids[1]
            assert [i for i, _ in found.likeliest(12)] == [i for i, _ in wanted.likeliest(12)]


@given(
    arrays(
        np.float32, (2, 90), elements=st.sampled_from([-np.inf, -9.0, -1.0, 0.0, 0.25, 3.0, 11.0])
    )
    | arrays(np.float32, (2, 2100), elements=st.floats(-30, 30, width=32))
)
def test_divergence_in_c_is_that_in_numpy(rows: np.ndarray) -> None:
    a, b = (Expectation.of(row) for row in rows)
    if a is None or b is None:
        return
    found = divergence(a, b)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOESCOPE_NATIVE", "0")
        wanted = divergence(a, b)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_expectations_without_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    fast = expectations(rows)
    monkeypatch.setenv("MOESCOPE_NATIVE", "0")
    for a, b in zip(fast, expectations(rows), strict=True):
        assert a is not None and b is not None and not b.best
        assert a.log_sum == pytest.approx(b.log_sum, abs=1e-5)
        assert [i for i, _ in a.likeliest()] == [i for i, _ in b.likeliest()]


@settings(max_examples=30, deadline=None)  # the first one imports torch
@given(st.integers(0, 2**32), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_rows_of_any_dtype_say_what_they_say_in_float32(seed: int, dtype: str) -> None:
    """On one thread or two, in the memory of a torch tensor; with what follows each row."""
    import torch

    random = torch.Generator().manual_seed(seed)
    T, V = 5, int(torch.randint(1, 400, (), generator=random))
    rows = torch.randn(T, V, generator=random).mul(3).round().to(getattr(torch, dtype))
    rows[1, V // 2] = float("nan")
    after = torch.randint(-1, V, (T,), generator=random).numpy()
    wide = rows.float().numpy()
    for threads in (1, 2):
        answers = native_ops.expect(
            rows.data_ptr(), T, V, 8, dtype=dtype, next_ids=after, threads=threads
        )
        if answers is None:
            return
        found = expectations_of(repeat(None, T), answers)
        for row, token, said in zip(wide, after.tolist(), found, strict=True):
            wanted = Expectation.of(row)
            assert (said is None) == (wanted is None)
            if said is None or wanted is None:
                continue
            assert said.log_sum == pytest.approx(wanted.log_sum, abs=1e-5)
            assert [i for i, _ in said.likeliest(4)] == [i for i, _ in wanted.likeliest(4)]
            if token >= 0:
                assert said.rank(token) == wanted.rank(token)
                assert said.logprob(token) == pytest.approx(wanted.logprob(token), abs=1e-5)


@given(ROWS)
def test_expectation_against_a_slow_twin(row: np.ndarray) -> None:
    found = Expectation.of(row)
    if not np.isfinite(row.max()):
        assert found is None
        return
    assert found is not None
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    wide = row.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum())
    assert [i for i, _ in found.likeliest()] == order[:8]
    for rank, token in enumerate(order, start=1):
        assert found.rank(token) == rank
        assert found.logprob(token) == pytest.approx(logprobs[token], abs=1e-5)


@given(ROWS, st.integers(0, 50))
def test_largest_is_a_stable_sort_cut_short(row: np.ndarray, count: int) -> None:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert largest(row, count).tolist() == order[:count]


@given(st.integers(0, 2**32), st.integers(500, 5000), st.integers(1, 40), st.integers(2, 200))
def test_largest_of_many_looks_at_blocks_first(
    seed: int, size: int, count: int, distinct: int
) -> None:
    row = np.random.default_rng(seed).integers(0, distinct, size).astype(np.float32)
    expected = np.argsort(-row, kind="stable")[:count]
    assert largest(row, count).tolist() == expected.tolist()


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-3, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(-5, 2**70),
)


@given(ROWS, SAMPLINGS, st.integers(0, 10_000))
def test_a_drawn_token_is_a_candidate_that_the_model_allows(
    row: np.ndarray, sampling: Sampling, position: int
) -> None:
    if not np.isfinite(row.max()):
        return
    token = choose(expectation(row), sampling, position)
    ids, weights = candidates(expectation(row), sampling)
    assert token in ids.tolist()
    assert weights[ids.tolist().index(token)] > 0 and np.isfinite(row[token])
    assert token == choose(expectation(row), sampling, position)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=20),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.1, min_p=0.07),
        Sampling(temperature=0.9, top_k=300, top_p=0.95, min_p=0.02),
        Sampling(temperature=3.0, top_p=0.999),
    ],
)
def test_the_filters_are_those_of_transformers(sampling: Sampling) -> None:
    """Which tokens are left and with which probability, for vocabularies around the first look."""
    import torch
    from transformers.generation import logits_process as theirs

    warpers = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(theirs.MinPLogitsWarper(sampling.min_p))
    random = np.random.default_rng(3)
    for size in (30, 1024, 5000):
        row = random.normal(scale=2.0, size=size).astype(np.float32)
        scores = torch.from_numpy(row)[None].double()
        for warper in warpers:
            scores = warper(None, scores)
        expected = scores.softmax(-1)[0].numpy()
        ids, weights = candidates(expectation(row), sampling)
        assert ids.tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(weights / weights.sum(), expected[ids], rtol=1e-5)


def test_draws_follow_the_distribution() -> None:
    row = np.log(np.array([0.5, 0.0, 0.25, 0.2, 0.05]) + 1e-30).astype(np.float32)
    draws = [choose(expectation(row), Sampling(temperature=1.0), p) for p in range(4000)]
    shares = np.bincount(draws, minlength=5) / len(draws)
    np.testing.assert_allclose(shares, [0.5, 0.0, 0.25, 0.2, 0.05], atol=0.03)


@settings(max_examples=50)
@given(st.integers(-(2**64), 2**130), st.integers(0, 2**40))
def test_numbers_depend_on_seed_and_position_alone(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0 and value == uniform(seed, position)
    assert value != uniform(seed + 1, position) and value != uniform(seed, position + 1)


@given(ROWS, ROWS)
def test_divergence_is_never_negative_and_0_on_itself(a: np.ndarray, b: np.ndarray) -> None:
    size = min(len(a), len(b))
    p, q = Expectation.of(a[:size]), Expectation.of(b[:size])
    if p is None or q is None:
        return
    assert divergence(p, p) == pytest.approx(0.0, abs=1e-6)
    assert divergence(p, q) >= 0.0
    lost = np.isfinite(a[:size]) & ~np.isfinite(b[:size])
    assert np.isinf(divergence(p, q)) == bool(lost.any())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("max_new_tokens", -1),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(MoescopeError, match=f"^{field}: expected"):
        check(Sampling(**{field: value}))
