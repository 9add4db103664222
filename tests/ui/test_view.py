"""Views are pure: what the panels are given, checked against the slow way to say it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moescope.kernels import route
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import RouterInfo, TraceMeta
from moescope.ui import find, routers, view
from moescope.ui.cells import Cells, levels
from moescope.ui.history import History, Lane
from moescope.ui.panels import LEVELS
from tests.ui.recorded import frames_of, meta_of, recorded


def history_of(tokens: int = 80, **options: object) -> tuple[routers.RouterTable, History, Lane]:
    trace = recorded(tokens, **options)  # type: ignore[arg-type]
    history = History(trace.meta, trace)
    history.pull()
    lane = history.lane(0)
    assert lane is not None
    return routers.table_of(trace.meta), history, lane


def test_load_is_counted_over_the_last_64_tokens():
    table, _, lane = history_of()
    counts = view.load_counts(lane, 79, table.widest)
    slow = np.zeros((table.count, table.widest), int)
    for row in range(16, 80):
        for router in range(table.count):
            for expert in lane.expert_ids[row, router]:
                slow[router, expert] += 1
    assert (counts == slow).all()
    assert counts.sum() == 64 * table.count * 4


def test_levels_are_steps_of_the_fair_share():
    table, _, _ = history_of()  # K/E = 1/4: 16 of 64 tokens is fair
    counts = np.tile(np.array([0, 1, 12, 16, 24, 40, 64, 64]), (6, 2))
    found = view.load_levels(counts, 64, table)
    assert found[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found.max() < LEVELS


def test_variant_on_the_same_logits_is_the_kernel_router_by_router():
    table, history, lane = history_of()
    logits = history.logits(lane, 40)
    assert logits is not None
    for name in ("trained", "softmax_over_selected", "num_experts_per_tok+2", "wrong_scoring_func"):
        found = routers.reroute(table, name, logits)
        specs = routers.specs_under(table, name)
        for router, spec in enumerate(specs):
            alone = route(logits[router : router + 1], spec)
            assert found.expert_ids[router].tolist() == alone.expert_ids[0].tolist()
            assert found.weights is not None
            np.testing.assert_array_equal(found.weights[router], alone.weights[0])
            assert found.score_sum[router] == alone.score_sum[0]


def test_trained_on_the_same_logits_is_what_was_generated():
    table, history, lane = history_of()
    logits = history.logits(lane, 33)
    assert logits is not None
    again, made = routers.reroute(table, "trained", logits), routers.as_generated(table, lane, 33)
    assert (again.expert_ids == made.expert_ids).all()
    np.testing.assert_array_equal(again.score_sum, made.score_sum)


def test_layers_with_other_routers_are_routed_with_their_own():
    specs = [
        meta_of(top_k=2).routers[0].spec,
        meta_of(top_k=4, norm_topk_prob=True).routers[0].spec,
    ]
    meta = TraceMeta(
        routers=tuple(RouterInfo(i, 16, 0, (2, 4)[i % 2], specs[i % 2]) for i in range(4))
    )
    table = routers.table_of(meta)
    logits = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    found = routers.reroute(table, "trained", logits)
    assert [(ids >= 0).sum() for ids in found.expert_ids] == [2, 4, 2, 4]
    assert found.score_sum[1] == pytest.approx(1) and found.score_sum[0] < 1


def test_layer_panel_has_the_first_expert_that_was_not_chosen():
    table, history, lane = history_of()
    row = 40
    made = routers.as_generated(table, lane, row)
    counts = view.load_counts(lane, row, table.widest)
    data = view.layer_data(table, lane, row, made, counts, view.Cursor(2, 0), "softmax")
    logits = history.logits(lane, row)
    assert logits is not None
    order = np.argsort(-logits[2], kind="stable")
    assert [r.expert for r in data.rows] == order[:4].tolist()
    assert data.runner_up is not None and data.runner_up.expert == order[4]
    scores = np.exp(logits[2] - logits[2].max())
    scores /= scores.sum()
    assert data.runner_up.score == pytest.approx(scores[order[4]], abs=1e-6)
    assert data.margin == pytest.approx(scores[order[3]] - scores[order[4]], abs=1e-6)
    assert data.score_sum == pytest.approx(scores[order[:4]].sum(), abs=1e-6)
    assert data.sum_expected == "trained: below 1" and not data.sum_wrong


@pytest.mark.parametrize(
    ("policy", "value", "wrong"),
    [
        ({"norm_topk_prob": True}, 1.0, False),
        ({"norm_topk_prob": True}, 0.7, True),
        ({"norm_topk_prob": True, "routed_scaling_factor": 2.5}, 2.5, False),
        ({"norm_topk_prob": True, "routed_scaling_factor": 2.5}, 1.0, True),
        ({}, 0.7, False),
        ({}, 1.0, True),
        ({}, 1.4, True),
    ],
)
def test_a_sum_the_trained_spec_does_not_allow_is_marked(policy, value, wrong):
    table = routers.table_of(meta_of(layers=2, **policy))
    made = routers.reroute(table, "trained", np.zeros((2, 16), np.float32))
    summed = replace(made, score_sum=np.full(2, value, np.float32))
    assert routers.sums_wrong(table, summed).tolist() == [wrong, wrong]


def test_a_saturated_softmax_may_sum_to_one():
    table = routers.table_of(meta_of(layers=1))
    logits = np.full((1, 16), -40, np.float32)
    logits[0, :4] = 3
    made = routers.reroute(table, "trained", logits)
    assert made.score_sum[0] == 1 and not routers.sums_wrong(table, made)[0]
    renormalised = routers.reroute(table, "softmax_over_selected", np.zeros((1, 16), np.float32))
    assert routers.sums_wrong(table, renormalised)[0]


def test_near_ties_are_relative_in_scores_and_in_logits():
    table = routers.table_of(meta_of(layers=1, experts=64))
    logits = np.linspace(0, -1, 64, dtype=np.float32)[None].copy()
    for gap, tie in ((0.005, True), (0.02, False)):
        logits[0, 4] = logits[0, 3] - gap
        logits[0, 5:] = -2
        for name in ("trained", "softmax_over_selected"):
            assert routers.near_ties(routers.reroute(table, name, logits))[0] == tie


def test_tokens_with_a_wrong_sum_are_marked_whatever_variant_made_them():
    table, _, lane = history_of(lanes=("softmax_over_selected",))
    assert routers.rows_wrong(table, lane, 0).all()
    table, _, lane = history_of()
    assert not routers.rows_wrong(table, lane, 0).any()


def test_the_bar_offers_what_changes_something_and_one_twin():
    plain = routers.bar_variants(routers.table_of(meta_of()))
    assert plain[0] == "trained" and "softmax_over_selected" in plain
    assert "no_renormalisation" not in plain  # that is how it was trained
    renormalised = routers.table_of(meta_of(norm_topk_prob=True))
    names = routers.bar_variants(renormalised)
    assert "no_renormalisation" in names and names[-1] == "softmax_over_selected"
    bar = view.variant_bar(renormalised, names, frozenset({"trained"}), names[1])
    assert bar.items[-1].equal_to == "A" and bar.items[0].state == "generating"
    assert [item.shown for item in bar.items].count(True) == 1


@pytest.mark.parametrize(
    ("expression", "equal"),
    [
        ("trained with forbid=L1:9", False),
        ("trained with forbid=L1:9,scale=2*1", False),
        ("softmax_over_selected", True),
        ("softmax_over_selected with min_p=0.2", False),
        ("experts_reversed", False),
    ],
)
def test_equal_lanes_agree_in_what_is_steered_and_rewired_too(expression, equal):
    table = routers.table_of(meta_of(norm_topk_prob=True))
    bar = view.variant_bar(table, ("trained", expression, expression), frozenset(), None)
    assert [item.equal_to for item in bar.items] == [
        "",
        "A" if equal else "",
        "A" if equal else "B",
    ]


def test_token_panel_tells_what_else_could_have_come():
    table, history, lane = history_of()
    data = view.token_data(table, lane, 10, history.pieces)
    assert data.shared_with_previous is not None
    shared = sum(
        len(set(lane.expert_ids[10, r]) & set(lane.expert_ids[9, r])) for r in range(table.count)
    )
    assert data.shared_with_previous == (shared, 24)
    assert data.alternatives[0] == (" the", pytest.approx(np.exp(-1.0)))
    assert data.near_ties is not None and data.near_ties[1] == table.count


@pytest.mark.parametrize("tint", ["sum", "margin", "entropy", "p", "novelty"])
def test_tints_stay_within_the_levels(tint):
    table, _, lane = history_of()
    found = levels(tint, table, lane, 1, 0)
    assert len(found) == lane.count and found.min() >= 0 and found.max() < LEVELS


def test_cells_of_old_tokens_are_kept():
    trace = recorded(40)
    history = History(trace.meta, trace)
    table, cells = routers.table_of(trace.meta), Cells()
    history.pull(20)
    first = cells.data(history, table, history.lane(0), 0, "sum", 0, True)
    history.pull()
    second = cells.data(history, table, history.lane(0), 0, "sum", 0, True)
    assert len(first.cells) == 20 and len(second.cells) == 40
    assert all(a is b for a, b in zip(first.cells, second.cells, strict=False))
    third = cells.data(history, table, history.lane(0), 3, "sum", 0, True)
    assert third.tint_epoch > second.tint_epoch and third.epoch == second.epoch


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("L03", find.Place(3)),
        ("e007", find.Place(None, 7)),
        (" L5E15 ", find.Place(5, 15)),
        ("@12", find.Place(position=12)),
        ("Late", None),
    ],
)
def test_addresses(text, place):
    assert find.parse(text, routers.table_of(meta_of())) == place


@pytest.mark.parametrize("text", ["L06", "E016", "L00E999", "L1a"])
def test_addresses_that_do_not_exist_say_what_does(text):
    assert " do)" in str(find.parse(text, routers.table_of(meta_of())))


def test_text_is_found_across_tokens_ignoring_case():
    _, _, lane = history_of()
    assert find.hits(lane, "UPON A time") == [1, 70]  # the story starts over
    assert find.hits(lane, "nowhere at all") == []


def test_specs_are_read_as_the_engine_wrote_them():
    table = routers.table_of(meta_of())
    assert all(isinstance(spec, RouterSpec) for spec in table.specs)
    assert table.labels == ("00", "01", "02", "03", "04", "05")


def test_sparse_frames_of_an_import_read_not_recorded():
    meta = meta_of()
    lane = Lane(0, 0, 6, 4)
    for frame in frames_of(meta, 5, logits=False):
        object.__setattr__(frame, "weights", None)
        object.__setattr__(frame, "scores", None)
        lane.append(frame)
    made = routers.as_generated(routers.table_of(meta), lane, 4)
    assert made.weights is None and made.scores is None
    counts = view.load_counts(lane, 4, 16)
    data = view.layer_data(routers.table_of(meta), lane, 4, made, counts, view.Cursor(), "")
    assert all(row.weight is None and row.score is None for row in data.rows)
