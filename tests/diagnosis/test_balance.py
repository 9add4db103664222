"""Balance: every measure against its definition, the losses against transformers, chance against
simulation, and whole traces through the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moescope import cli
from moescope.diagnosis import balance, balance_chance
from moescope.diagnosis.balance_report import LOAD_MEASURES, balance_of
from moescope.trace.frames import RouterInfo, TraceEvent
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceWriter
from tests.trace.samples import a_frame, a_meta, record_trace

LOADS = hnp.arrays(np.int64, st.tuples(st.just(1), st.integers(1, 9)), elements=st.integers(0, 40))


@given(LOADS)
@settings(max_examples=60, deadline=None)
def test_load_measures_are_their_formulas(load: Any) -> None:
    n = [float(value) for value in load[0]]
    E, N = len(n), sum(n)
    found = {name: float(measure(load)[0]) for name, measure in LOAD_MEASURES.items()}
    if not N:
        assert found.pop("dead") == found.pop("cold") == 0
        assert all(math.isnan(value) for value in found.values())
        return
    m = N / E
    p = [value / N for value in n]
    cv = math.sqrt(sum((v - m) ** 2 for v in n) / E) / m
    expected = {
        "cv": cv,
        "max_over_mean": max(n) / m,
        "max_violation": (max(n) - m) / m,
        "gini": sum(abs(a - b) for a in n for b in n) / (2 * E * N),
        "jain": N**2 / (E * sum(v**2 for v in n)),
        "effective_experts": math.exp(-sum(q * math.log(q) for q in p if q)) / E,
        "dead": sum(v == 0 for v in n),
        "cold": sum(0 < v < 0.1 * m for v in n),
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["jain"] == pytest.approx(1 / (1 + cv**2))
    for top in range(1, E + 1):
        share = sum(sorted(n)[E - top :]) / N
        assert balance.coverage(load, top)[0] == pytest.approx(share)


def test_even_and_lopsided_loads_give_the_values_the_docstrings_name() -> None:
    even, lone = np.full((1, 8), 5), np.array([[0, 0, 0, 40, 0, 0, 0, 0]])
    ends = {
        "cv": (0, math.sqrt(7)),
        "max_over_mean": (1, 8),
        "max_violation": (0, 7),
        "gini": (0, 7 / 8),
        "jain": (1, 1 / 8),
        "effective_experts": (1, 1 / 8),
        "dead": (0, 7),
        "cold": (0, 0),
    }
    for name, measure in LOAD_MEASURES.items():
        assert [measure(even)[0], measure(lone)[0]] == pytest.approx(ends[name], abs=1e-12), name
    assert balance.coverage(even, 2)[0] == 2 / 8
    assert balance.distance(even, lone)[0] == pytest.approx(7 / 8)
    assert balance.distance(even, 3 * even)[0] == 0


def test_every_measure_says_formula_balance_and_source() -> None:
    for name in ("layer_loss", "pooled_loss", "sequence_loss", "z_terms", "pair_counts", "lift"):
        text = getattr(balance, name).__doc__
        assert all(word in text for word in ("Formula:", "Balanced:", "Source:")), name
    for measure in (*LOAD_MEASURES.values(), balance.coverage, balance.distance):
        text = measure.__doc__ or ""
        assert all(word in text for word in ("Formula:", "Balanced:", "Source:")), measure


# --- losses ---------------------------------------------------------------------------------------


def trace_of(logits: Any, k: int, **fields: Any) -> MemoryTrace:
    """One sequence of frames with these router logits [T, L, E], routed as softmax, top-k."""
    T, L, E = logits.shape
    trace = MemoryTrace(a_meta(routers=L, experts=E, k=k))
    for t in range(T):
        ids = np.argsort(-logits[t], axis=1, kind="stable")[:, :k].astype(np.int16)
        more = {name: values[t] for name, values in fields.items()}
        trace.append(
            a_frame(t, routers=L, experts=E, k=k, expert_ids=ids, logits=logits[t], **more)
        )
    return trace


@given(seed=st.integers(0, 2**16), padded=st.booleans(), k=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_the_pooled_loss_is_transformers(seed: int, padded: bool, k: int) -> None:
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    random = np.random.default_rng(seed)
    T, L, E = 300, 3, 8
    logits = (2 * random.standard_normal((T, L, E)) + random.standard_normal(E)).astype(np.float32)
    mask = np.arange(T) < (T - 40 if padded else T)
    theirs = load_balancing_loss_func(
        tuple(torch.from_numpy(logits[:, layer]) for layer in range(L)),
        E,
        k,
        torch.from_numpy(mask[None].astype(np.int64)) if padded else None,
    )
    trace = trace_of(logits, k, token_id=np.where(mask, 5, 99))
    ours = balance_of(trace, padding=[99] if padded else [])
    assert ours.tokens == mask.sum() and ours.padding == T - mask.sum()
    assert ours.auxiliary is not None and ours.auxiliary.tokens == mask.sum()
    assert ours.auxiliary.pooled == pytest.approx(float(theirs), rel=1e-6)
    assert ours.auxiliary.pooled_balanced == k


def test_opposite_imbalances_cancel_when_layers_are_pooled() -> None:
    """The story of transformers #28255: two layers, each of which uses half of its experts."""
    T, E, k = 400, 8, 2
    random = np.random.default_rng(1)
    logits = random.standard_normal((T, 2, E)).astype(np.float32)
    logits[:, 0, :4] += 30
    logits[:, 1, 4:] += 30
    found = balance_of(trace_of(logits, k)).auxiliary
    assert found is not None
    assert found.pooled == pytest.approx(found.pooled_balanced, rel=0.01)
    assert found.layers_mean == pytest.approx(2.0, rel=0.02) and found.layers_balanced == 1
    even = balance_of(trace_of(random.standard_normal((T, 2, E)).astype(np.float32), k)).auxiliary
    assert even is not None and even.layers_mean == pytest.approx(1.0, abs=0.02)


def test_the_layer_loss_by_hand_and_for_sigmoid_scores() -> None:
    random = np.random.default_rng(3)
    logits = random.standard_normal((50, 1, 6)).astype(np.float32)
    trace = trace_of(logits, 2)
    policy = {"policy": {"num_experts_per_tok": 2, "scoring_func": "sigmoid"}}
    spec = {**policy, "wiring": {"num_experts": 6}}
    trace.meta = a_meta(routers=1, experts=6, k=2)
    object.__setattr__(trace.meta, "routers", (RouterInfo(0, 6, 0, 2, spec),))
    scores = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
    P = (scores / scores.sum(1, keepdims=True)).mean(0)
    f = np.bincount(np.argsort(-scores, 1)[:, :2].ravel(), minlength=6) / 100
    (router,) = balance_of(trace).routers
    assert router.layer_loss == pytest.approx(6 * float(f @ P), rel=1e-9)


def test_a_router_that_is_even_only_over_all_sequences() -> None:
    T, E = 40, 8
    trace = MemoryTrace(a_meta(routers=1, experts=E, k=2))
    random = np.random.default_rng(0)
    for sequence in range(2):
        logits = random.standard_normal((T, 1, E)).astype(np.float32)
        logits[:, :, 4 * sequence : 4 * sequence + 4] += 20
        for t in range(T):
            ids = np.argsort(-logits[t], axis=1)[:, :2].astype(np.int16)
            numbers = {"expert_ids": ids, "logits": logits[t]}
            trace.append(a_frame(t, sequence=sequence, routers=1, experts=E, k=2, **numbers))
    found = balance_of(trace)
    (router,) = found.routers
    assert found.sequences == 2 and router.tokens == 2 * T
    assert router.layer_loss == pytest.approx(1.0, abs=0.05)
    assert router.sequence_loss == pytest.approx(2.0, abs=0.1)
    parts = [(np.eye(4)[None, 0], np.eye(4)[None, 0], np.ones(1)), (np.zeros((1, 4)),) * 2]
    parts[1] = (np.zeros((1, 4)), np.zeros((1, 4)), np.zeros(1))
    assert balance.sequence_loss(parts)[0] == 4.0  # a sequence without picks counts nowhere


@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-50, 50)))
@settings(max_examples=20, deadline=None)
def test_the_z_loss_is_the_square_of_logsumexp(logits: Any) -> None:
    import torch

    theirs = torch.logsumexp(torch.from_numpy(logits), -1).numpy() ** 2
    assert balance.z_terms(logits) == pytest.approx(theirs, abs=1e-9)


# --- pairs ----------------------------------------------------------------------------------------


@given(st.lists(st.sets(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_pairs_against_counting(tokens: list[set[int]]) -> None:
    ids = np.array([[*sorted(picked), -1] for picked in tokens])
    counts = balance.pair_counts(ids, 6)
    lift = balance.lift(counts, len(tokens))
    for a in range(6):
        for b in range(6):
            together = sum(a in picked and b in picked for picked in tokens)
            assert counts[a, b] == together
            alone = [sum(e in picked for picked in tokens) for e in (a, b)]
            if a == b or 0 in alone:
                assert np.isnan(lift[a, b])
            else:
                assert lift[a, b] == pytest.approx(together * len(tokens) / (alone[0] * alone[1]))


# --- chance ---------------------------------------------------------------------------------------


def simulated(tokens: int, E: int, k: int, runs: int = 400) -> Any:
    """Loads [runs, E] of an even router."""
    random = np.random.default_rng(tokens * 1000 + E + k)
    loads = np.zeros((runs, E), np.int64)
    for run in range(runs):
        picked = np.argsort(random.random((tokens, E)), axis=1)[:, :k]
        loads[run] = np.bincount(picked.ravel(), minlength=E)
    return loads


@pytest.mark.parametrize(("tokens", "E", "k"), [(40, 8, 2), (200, 16, 4), (60, 32, 1), (25, 6, 5)])
def test_the_noise_floor_is_what_even_routers_show(tokens: int, E: int, k: int) -> None:
    loads = simulated(tokens, E, k)
    cv, violation = balance.variation(loads), balance.max_violation(loads)
    assert np.sqrt((cv**2).mean()) == pytest.approx(
        balance_chance.expected_variation(tokens, E, k), rel=0.05
    )
    assert (cv > balance_chance.bound_variation(tokens, E, k)).mean() == pytest.approx(
        0.05, abs=0.035
    )
    expected = balance_chance.expected_max_violation(tokens, E, k)
    assert violation.mean() == pytest.approx(expected, rel=0.12)
    assert (violation > balance_chance.bound_max_violation(tokens, E, k)).mean() < 0.1
    dead = (loads == 0).sum(axis=1).mean()
    assert dead == pytest.approx(balance_chance.expected_dead(tokens, E, k), abs=0.5)
    statistic = [balance_chance.chi_square(float(c), tokens, E, k) for c in cv]
    assert np.mean(statistic) == pytest.approx(E - 1, rel=0.1)


def test_chi_square_against_tables() -> None:
    for degrees, value in ((1, 3.841459), (2, 5.991465), (9, 16.918978), (63, 82.528727)):
        assert balance_chance.p_value(value, degrees) == pytest.approx(0.05, abs=1e-7)
        assert balance_chance.critical(degrees) == pytest.approx(value, abs=1e-4)
    assert balance_chance.p_value(1e6, 127) == 0.0 and balance_chance.p_value(0.0, 5) == 1.0


@given(st.floats(0.02, 2.0), st.sampled_from([(8, 2), (64, 8), (128, 1)]))
@settings(max_examples=30, deadline=None)
def test_tokens_needed_is_where_the_bound_falls_below(cv: float, shape: tuple[int, int]) -> None:
    E, k = shape
    needed = balance_chance.tokens_needed(cv, E, k)
    assert needed is not None and balance_chance.bound_variation(needed, E, k) <= cv * (1 + 1e-9)
    if needed > 1:
        assert balance_chance.bound_variation(needed - 1, E, k) > cv * (1 - 1e-9)


def test_where_nothing_can_be_said() -> None:
    assert balance_chance.tokens_needed(0.0, 8, 2) is None
    assert balance_chance.tokens_needed(0.5, 8, 8) is None
    assert math.isnan(balance_chance.chi_square(0.0, 10, 8, 8))
    assert math.isnan(balance_chance.expected_max_violation(0, 8, 2))
    zero = np.zeros(4, np.int64)
    assert math.isnan(balance_chance.expected_distance(zero, zero, 0, 5))


# --- whole traces ---------------------------------------------------------------------------------


def test_a_trace_across_blocks_phases_and_forks() -> None:
    trace = MemoryTrace(a_meta())
    for position in range(300):
        trace.append(a_frame(position))
    trace.append(a_frame(299, token_id=7))  # the newer of two counts
    trace.event(TraceEvent("fork", {"expression": "b", "fork_of": 0}, lane=1, position=200))
    for position in range(200, 260):
        trace.append(a_frame(position, lane=1))
    found = balance_of(trace)
    ids = np.stack([a_frame(p).expert_ids for p in range(300)])
    for layer, router in enumerate(found.routers):
        load = np.bincount(ids[:, layer].ravel(), minlength=16)
        assert router.load == tuple(load.tolist()) and router.tokens == 300
        early = np.bincount(ids[:4, layer].ravel(), minlength=16)
        assert router.by_phase["prefill"]["tokens"] == 4
        assert router.prefill_decode == pytest.approx(
            float(np.abs(early / early.sum() - (load - early) / (load - early).sum()).sum() / 2)
        )
    assert (found.prefill, found.decode, found.sequences) == (4, 296, 1)
    fork = balance_of(trace, 1)
    assert fork.tokens == 260 and fork.variants == ("b",)
    chance = [fork.routers[0].prefill_decode_chance, found.routers[0].prefill_decode_chance]
    assert all(0 < value < 1 for value in chance)


def test_rows_without_a_decision_count_nowhere() -> None:
    trace = MemoryTrace(a_meta(routers=2, experts=4, k=2))
    sizes = {"routers": 2, "experts": 4, "k": 2}
    lost = np.array([[0, 1], [-1, -1]], np.int16)
    logits = np.array([[3, 2, 1, 0], [np.nan, 0, 0, 0]], np.float32)
    trace.append(a_frame(0, expert_ids=lost, logits=logits, **sizes))
    found = balance_of(trace)
    assert [router.tokens for router in found.routers] == [1, 0]
    assert found.routers[1].layer_loss is None and math.isnan(found.routers[1].measures["cv"])
    json.dumps(found.to_json(), allow_nan=False)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_in_words_and_as_json(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.moetrace"
    record_trace(path, 60)
    assert cli.run(["balance", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("60 tokens (4 of prompts, 56 decoded)", "MaxVio", "even: 2", "even: 1", "lift"):
        assert part in text
    assert cli.run(["balance", str(path), "--json", "--pairs", "0", "--padding", "3"]) == 0
    document = json.loads(capsys.readouterr().out)
    router = document["routers"][0]
    assert sum(router["load"]) == 120 and document["balanced"]["max_over_mean"] == 1
    assert sum(pair["tokens"] for pair in router["pairs"]) == 60  # K = 2: one pair a token
    assert document["auxiliary"]["pooled_balanced"] == 2


def test_without_logits_there_are_no_losses(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.moetrace"
    record_trace(path, 5, record="ids")
    assert cli.run(["balance", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auxiliary"] is None
    assert cli.run(["balance", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "not recorded" in shown and "no more uneven than chance" in shown


def test_what_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.moetrace"
    record_trace(path, 5)
    assert cli.run(["balance", str(path), "--lane", "B"]) == 2
    assert "expected one of A" in capsys.readouterr().err
    assert cli.run(["balance", str(path), "--lane", "nonsense"]) == 2
    empty = tmp_path / "empty.moetrace"
    with TraceWriter(empty, a_meta()):
        pass
    assert cli.run(["balance", str(empty)]) == 4
    with TraceWriter(tmp_path / "none.moetrace", a_meta(routers=0)) as writer:
        writer.append(a_frame(0, routers=0))
    assert cli.run(["balance", str(tmp_path / "none.moetrace")]) == 4
    broken = tmp_path / "broken.moetrace"
    broken.write_bytes(path.read_bytes()[:5000])
    assert cli.run(["balance", str(broken)]) == 4
    assert cli.run(["balance", str(tmp_path / "absent")]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_other_formats_are_read_too(tmp_path: Path, capsys: Any) -> None:
    path, csv = tmp_path / "run.moetrace", tmp_path / "run.csv"
    record_trace(path, 30)
    assert cli.run(["convert", str(path), str(csv)]) == 0
    documents = []
    for source in (path, csv):
        capsys.readouterr()
        assert cli.run(["balance", str(source), "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out)["routers"])
    for a, b in zip(*documents, strict=True):
        assert a["load"] == b["load"] and a["measures"] == b["measures"]
