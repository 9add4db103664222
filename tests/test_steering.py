"""Steering: the small grammar, and what it does to rows of logits against doing it by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine.torch_steering import steered
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.variants import steering
from moescope.variants.steering import Steering, canonical, of_routers, parse, split

E = 8


def spec_of(k: int = 3, **policy: Any) -> RouterSpec:
    spec = RouterSpec(RouterPolicy(num_experts_per_tok=k, **policy), RouterWiring(num_experts=E))
    return spec.resolved("float32")


# --- the grammar ----------------------------------------------------------------------------------


def test_an_expression_is_a_variant_and_what_is_steered() -> None:
    assert split("trained with forbid=3") == ("trained", "forbid=3")
    assert split("top_k+1") == ("top_k+1", "") and split(" with force=1") == ("trained", "force=1")
    written = " trained  with  scale=L0-3+5:7*0.50 , forbid=L12:3+5 ,min_p=L2:.25, force=1-2"
    assert canonical(written) == (
        "trained with scale=L0-3+5:7*0.5,forbid=L12:3+5,min_p=L2:0.25,force=1-2"
    )
    assert canonical("num_experts_per_tok=4@3-7") == "num_experts_per_tok=4@3-7"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["forbid", "force", "scale"]),
            st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1),
            st.lists(st.integers(0, 7), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_again(items: list[Any]) -> None:
    parts = []
    for kind, layers, experts in items:
        spans = [f"{min(span)}-{max(span)}" for span in layers or ()]
        place = f"L{'+'.join(spans)}:" if spans else ""
        factor = "*0.25" if kind == "scale" else ""
        parts.append(f"{kind}={place}{'+'.join(map(str, experts))}{factor}")
    found = parse(",".join(parts))
    assert parse(",".join(map(str, found))) == found


@pytest.mark.parametrize(
    "text",
    [
        *("forbid", "forbid=", "forbid=L3", "forbid=x", "drop=3", "scale=3", "scale=3*-1"),
        *("min_p=0", "min_p=1.5", "min_p=L3:", "forbid=5-3", "forbid=L9-2:1", "scale=3*nan"),
        *("forbid=3;force=2", "forbid=1,,force=2", "forbid=" + "1+" * 600 + "1"),
        ",".join(["forbid=1"] * 70),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(MoescopeError, match="steering") as caught:
        parse(text)
    assert caught.value.code == ExitCode.USAGE and "\n" not in caught.value.message


def test_items_find_their_layers_and_are_checked_against_them() -> None:
    routers = [(0, spec_of()), (2, spec_of()), (5, spec_of())]
    found = of_routers("forbid=L0-2:1+3,scale=7*0.5,min_p=L5:0.2,scale=L5:7*2", routers)
    assert found[0] == Steering(forbid=(1, 3), scale=((7, 0.5),))
    assert found[1] == found[0] and found[2] == Steering(scale=((7, 2.0),), min_p=0.2)
    assert of_routers("force=L2:4", routers)[0] is None
    biased = spec_of(correction_bias="score", weights_from="biased_scores")
    mixer = RouterSpec(
        RouterPolicy(num_experts_per_tok=2, scoring_func="sparsemixer"), RouterWiring(num_experts=E)
    )
    for text, spec, words in (
        ("forbid=8", spec_of(), "experts 0 to 7"),
        ("forbid=L3:1", spec_of(), "layers with a router"),
        ("forbid=1,force=1", spec_of(), "both forbidden and forced"),
        ("force=0-3", spec_of(), "only 3 experts"),
        ("forbid=0-5", spec_of(), "3 experts must be left"),
        ("force=1", biased, "cannot be steered"),
        ("forbid=1", mixer, "cannot be steered"),
    ):
        with pytest.raises(MoescopeError, match=words):
            of_routers(text, [(0, spec)])


# --- what it does ---------------------------------------------------------------------------------

SPECS = {
    "softmax": spec_of(),
    "normalised": spec_of(norm_topk_prob=True),
    "over selected": spec_of(score_order="topk_then_score"),
    "sigmoid": spec_of(scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5),
    "biased": spec_of(scoring_func="sigmoid", correction_bias="score", norm_topk_prob=True),
    "grouped": spec_of(scoring_func="sigmoid", n_group=4, topk_group=2, group_score="max"),
    "logits": spec_of(weights_from="logits"),
    "scaled": spec_of(per_expert_scale=True),
}


def rows(seed: int = 0, count: int = 20) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    draw = np.random.default_rng(seed)
    logits = (2 * draw.standard_normal((count, E))).astype(np.float32)
    bias = draw.normal(0, 0.3, E).astype(np.float32)
    scale = draw.uniform(0.5, 2, E).astype(np.float32)
    router = SimpleNamespace(
        correction_bias=torch.from_numpy(bias), per_expert_scale=torch.from_numpy(scale)
    )
    return torch.from_numpy(logits), router, {"correction_bias": bias, "per_expert_scale": scale}


def plainly(logits: torch.Tensor, spec: RouterSpec, vectors: dict[str, Any]) -> Any:
    return route(logits.numpy(), spec, **vectors)


@pytest.mark.parametrize("name", SPECS)
def test_without_steering_it_is_the_router_itself(name: str) -> None:
    logits, router, vectors = rows()
    expected = plainly(logits, SPECS[name], vectors)
    found = steered(logits, SPECS[name], Steering(), router)
    assert found.expert_ids.tolist() == expected.expert_ids.tolist()
    assert found.weights.numpy() == pytest.approx(expected.weights, abs=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_a_forbidden_expert_is_never_chosen_and_scores_stay(name: str) -> None:
    spec = SPECS[name]
    logits, router, vectors = rows(1)
    found = steered(logits, spec, Steering(forbid=(2, 5)), router)
    ids, free = found.expert_ids.numpy(), plainly(logits, spec, vectors)
    assert not np.isin(ids, (2, 5)).any() and (ids >= 0).all()
    untouched = ~np.isin(free.expert_ids, (2, 5)).any(1)
    if name != "grouped":  # a group can fall when its best expert is forbidden
        assert untouched.any() and (ids[untouched] == free.expert_ids[untouched]).all()
        assert found.weights.numpy()[untouched] == pytest.approx(free.weights[untouched], abs=1e-6)
    # the scores of the chosen are those of the whole row, as if nothing were forbidden
    scored = spec.with_policy(num_experts_per_tok=E, n_group=1, topk_group=1)
    whole = plainly(logits, scored, vectors)
    if spec.policy.score_order == "score_then_topk":
        scores = np.zeros_like(whole.scores)
        np.put_along_axis(scores, whole.expert_ids, whole.scores, 1)
        expected = np.take_along_axis(scores, ids, 1)
        assert found.scores.numpy() == pytest.approx(expected, abs=1e-6)
    if spec.policy.norm_topk_prob:
        assert found.score_sum.numpy() == pytest.approx(spec.weight_scale, abs=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_a_forced_expert_is_always_chosen_for_what_it_scores(name: str) -> None:
    spec = SPECS[name]
    logits, router, vectors = rows(2)
    found = steered(logits, spec, Steering(force=(4, 6)), router)
    ids = found.expert_ids.numpy()
    assert (ids == 4).any(1).all() and (ids == 6).any(1).all()
    assert len(set(ids[0].tolist())) == 3
    free = plainly(logits, spec, vectors)
    has_both = (free.expert_ids == 4).any(1) & (free.expert_ids == 6).any(1)
    for row in np.flatnonzero(has_both):
        if name == "grouped":
            continue
        assert set(ids[row]) == set(free.expert_ids[row])
        mine = dict(zip(ids[row].tolist(), found.weights.numpy()[row], strict=True))
        theirs = dict(zip(free.expert_ids[row].tolist(), free.weights[row], strict=True))
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_a_scaled_expert_weighs_less_and_sums_say_so() -> None:
    logits, router, _ = rows(3)
    free = steered(logits, SPECS["normalised"], Steering(), router)
    found = steered(logits, SPECS["normalised"], Steering(scale=((3, 0.25),)), router)
    assert torch.equal(free.expert_ids, found.expert_ids)
    factor = torch.where(free.expert_ids == 3, 0.25, 1.0)
    assert torch.allclose(found.weights, free.weights * factor)
    assert torch.allclose(found.score_sum, found.weights.sum(1))
    assert (found.score_sum < 0.999).any()


@pytest.mark.parametrize("name", ["softmax", "normalised", "over selected", "sigmoid"])
def test_experts_below_the_threshold_are_left_out(name: str) -> None:
    spec = SPECS[name]
    logits, router, _ = rows(4)
    free = steered(logits, spec, Steering(), router)
    share = 0.85 if name == "sigmoid" else 0.5
    found = steered(logits, spec, Steering(min_p=share), router)
    left_out = 0
    for row in range(len(logits)):
        best = float(free.scores[row].max())
        for slot in range(3):
            below = float(free.scores[row, slot]) < share * best
            left_out += below
            assert (int(found.expert_ids[row, slot]) == -1) == below
            assert (float(found.weights[row, slot]) == 0) == below
    assert 5 < left_out < 55
    if name == "softmax":
        kept = found.expert_ids >= 0
        assert torch.equal(found.weights[kept], free.weights[kept])
    else:
        assert torch.allclose(found.score_sum, free.score_sum, atol=1e-6)


def test_an_invalid_row_stays_invalid() -> None:
    logits, router, _ = rows(5)
    logits[3, 2] = float("nan")
    everything = Steering(forbid=(0,), force=(1,), scale=((2, 0.5),), min_p=0.1)
    found = steered(logits, SPECS["normalised"], everything, router)
    assert found.expert_ids[3].tolist() == [-1, -1, -1] and bool(torch.isnan(found.score_sum[3]))
    assert torch.isfinite(found.score_sum[[0, 1, 2, 4]]).all()


def test_the_hint_is_an_example_of_each() -> None:
    for example in steering.HINT.split("   "):
        parse(split(example)[1] or example)


# --- on MLX ---------------------------------------------------------------------------------------


def steerings() -> st.SearchStrategy[Steering]:
    experts = st.permutations(range(E))
    numbers = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3))

    def of(drawn: tuple[list[int], tuple[int, int, int], float, float]) -> Steering:
        order, (away, held, scaled), factor, min_p = drawn
        return Steering(
            forbid=tuple(sorted(order[:away])),
            force=tuple(sorted(order[away : away + held])),
            scale=tuple((expert, factor) for expert in sorted(order[-scaled:] if scaled else ())),
            min_p=min_p,
        )

    shares = st.sampled_from([0.0, 0.0, 0.3, 0.6])
    return st.tuples(experts, numbers, st.sampled_from([0.0, 0.5, 3.0]), shares).map(of)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(SPECS)), steerings(), st.integers(0, 99))
def test_mlx_steers_as_torch_does(name: str, steering: Steering, seed: int) -> None:
    mx = pytest.importorskip("mlx.core")
    from moescope.engine import mlx_steering

    spec = SPECS[name]
    logits, router, vectors = rows(seed, 6)
    own = SimpleNamespace(**{field: mx.array(vector) for field, vector in vectors.items()})
    expected = steered(logits, spec, steering, router)
    found = mlx_steering.steered(mx.array(logits.numpy()), spec, steering, own)
    assert np.array(found.expert_ids).tolist() == expected.expert_ids.tolist()
    for field in ("weights", "scores", "score_sum", "entropy", "margin"):
        mine, theirs = np.array(getattr(found, field)), getattr(expected, field).numpy()
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=field)
