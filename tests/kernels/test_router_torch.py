"""The torch router against the reference, its short path against the long, and planted faults."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route, torch_ops
from moescope.kernels.spec import Routing
from tests.kernels.strategies import KINDS, Case, cases, rows_of

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_torch(logits: np.ndarray, spec: RouterSpec, **inputs: Any) -> Routing:
    """The torch router on numpy arrays, back in numpy."""
    tensors = {k: None if v is None else torch.from_numpy(v) for k, v in inputs.items()}
    result = route(torch.from_numpy(logits), spec, backend="torch", **tensors)
    return to_numpy(result)


def to_numpy(result: Routing) -> Routing:
    values = {f.name: getattr(result, f.name) for f in fields(Routing)}
    return Routing(**{k: None if v is None else v.numpy() for k, v in values.items()})


@PROPERTY
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    expected = route(case.logits, case.spec, **case.inputs)
    found = on_torch(case.logits, case.spec, **case.inputs)
    assert not compare(expected, found, case.spec, case.logits, correction_bias=case.bias)


@st.composite
def plain_cases(draw: st.DrawFn) -> tuple[RouterSpec, np.ndarray]:
    """Specs that take the short path, with every kind of row."""
    E = draw(st.sampled_from([2, 8, 60, 64, 128]))
    policy = RouterPolicy(
        draw(st.integers(1, min(E, 16))),
        logits_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        score_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        score_order=draw(st.sampled_from(["score_then_topk", "topk_then_score"])),
        norm_topk_prob=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([0.0, 1e-20, 1e-3])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        scale_power=draw(st.sampled_from([0, 1, 2])),
    )
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    spec = RouterSpec(policy, RouterWiring(E, combine_dtype=dtype))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return spec, rows_of(draw(st.sampled_from(KINDS)), draw(st.integers(1, 4)), E, rng)


@PROPERTY
@given(plain_cases())
def test_the_short_path_is_the_long_one(case: tuple[RouterSpec, np.ndarray]) -> None:
    spec, logits = case
    assert torch_ops.is_plain(spec)
    short = on_torch(logits, spec)
    long = torch_ops._route_any(torch.from_numpy(logits), spec, None, None, None, None, False)
    for field in fields(Routing):
        a, b = getattr(short, field.name), getattr(to_numpy(long), field.name)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=2e-7, atol=1e-14, err_msg=field.name)


def test_results_are_tensors_of_the_promised_types() -> None:
    spec = RouterSpec(RouterPolicy(4), RouterWiring(16, combine_dtype="bfloat16"))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = route(x, spec, backend="torch", keep_logits=True)
    assert result.expert_ids.dtype == result.runner_up.dtype == torch.int32
    assert result.weights.dtype == result.entropy.dtype == result.logits.dtype == torch.float32
    assert result.expert_ids.shape == result.weights.shape == (3, 4)
    assert torch.equal(result.logits, x.float())


def test_one_bad_row_does_not_reach_its_neighbours() -> None:
    spec = RouterSpec(RouterPolicy(2), RouterWiring(8, combine_dtype="float32"))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    clean = on_torch(x, spec)
    x[2, 3] = np.nan
    result = on_torch(x, spec)
    assert result.expert_ids[2].tolist() == [-1, -1] and result.weights[2].tolist() == [0, 0]
    np.testing.assert_array_equal(result.expert_ids[[0, 1, 3]], clean.expert_ids[[0, 1, 3]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "correction_bias: this router needs it"),
        ({"correction_bias": torch.zeros(5)}, r"expected \[8\] or \[1, 8\], found \[5\]"),
    ],
)
def test_missing_and_misshapen_inputs_are_refused(inputs: dict[str, Any], message: str) -> None:
    policy = RouterPolicy(2, scoring_func="sigmoid", correction_bias="score")
    spec = RouterSpec(policy, RouterWiring(8, combine_dtype="float32"))
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 8), spec, backend="torch", **inputs)


def test_importing_the_package_brings_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, moescope.kernels, moescope.kernels.spec, moescope.variants;"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# --- planted faults: the rule that finds no difference above must find these ----------------------

GROUPED = {
    "scoring_func": "sigmoid",
    "correction_bias": "score",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
SPARSE = {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01}
PLANTED = [
    ({}, {"tie_break": "higher_id"}),
    (GROUPED, {"tie_break": "higher_id"}),
    (GROUPED, {"weights_from": "biased_scores"}),
    (GROUPED, {"weights_from": "biased_minus_bias"}),
    (GROUPED, {"group_mask_fill": "0"}),
    (GROUPED, {"group_score": "max"}),
    (GROUPED, {"topk_group": 3}),
    (GROUPED, {"n_group": 1, "topk_group": 1}),
    (GROUPED, {"correction_bias": "none"}),
    (GROUPED, {"correction_bias_dtype": "bfloat16"}),
    (GROUPED, {"norm_eps": 1e-3}),
    (GROUPED, {"norm_p": 2.0}),
    (GROUPED, {"routed_scaling_factor": 2.4999}),
    (GROUPED, {"scale_power": 2}),
    ({}, {"norm_topk_prob": True}),
    ({}, {"score_order": "topk_then_score"}),
    ({}, {"scoring_func": "sigmoid"}),
    ({}, {"weights_from": "logits"}),
    ({}, {"score_passes": 2}),
    ({}, {"logits_dtype": "bfloat16"}),
    ({}, {"score_dtype": "float16"}),
    ({}, {"router_logit_scale": 1.001}),
    ({}, {"router_logit_softcapping": 30.0}),
    (SPARSE, {"router_jitter_noise": 0.02}),
    (SPARSE, {"scoring_func": "softmax"}),
]


def planted_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows among which every planted fault shows: ties, low scores, and biases below 0."""
    rng = np.random.default_rng(8)
    kinds = ("normal", "ties", "negative", "wide")
    x = np.concatenate([rows_of(kind, 64, 32, rng) for kind in kinds])
    bias = (np.round(rng.normal(size=32)) - 1.003).astype(np.float32)
    return x, bias


@pytest.mark.parametrize(("policy", "fault"), PLANTED, ids=str)
def test_a_planted_fault_disagrees(policy: dict[str, Any], fault: dict[str, Any]) -> None:
    K = 2 if policy is SPARSE else 4
    right = RouterSpec(RouterPolicy(K, **policy), RouterWiring(32, combine_dtype="float32"))
    logits, bias = planted_rows()
    expected = route(logits, right, correction_bias=bias)
    good = on_torch(logits, right, correction_bias=bias)
    bad = on_torch(logits, right.with_policy(**fault), correction_bias=bias)
    assert not compare(expected, good, right, logits, correction_bias=bias)
    assert compare(expected, bad, right, logits, correction_bias=bias)


def test_a_kernel_that_leaves_ties_to_chance_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RouterSpec(
        RouterPolicy(4, scoring_func="sigmoid"), RouterWiring(32, combine_dtype="float32")
    )
    logits = rows_of("ties", 64, 32, np.random.default_rng(9))
    expected = route(logits, spec)

    def by_topk(values: torch.Tensor, higher_id: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.topk(values, values.shape[-1], sorted=True)

    monkeypatch.setattr(torch_ops, "_sort", by_topk)
    assert compare(expected, on_torch(logits, spec), spec, logits)


@pytest.mark.parametrize("name", ["weights", "score_sum", "mass", "entropy", "margin", "runner_up"])
def test_the_agreement_rule_reads_every_field(name: str) -> None:
    spec = RouterSpec(RouterPolicy(2), RouterWiring(8, combine_dtype="float32"))
    logits = rows_of("normal", 3, 8, np.random.default_rng(0))
    result = route(logits, spec)
    values = {f.name: getattr(result, f.name) for f in fields(Routing)}
    changed = values[name].copy()
    changed[1] += 1
    found = compare(result, Routing(**{**values, name: changed}), spec, logits)
    assert {d.field for d in found} == {name} and {d.row for d in found} == {1}
    assert str(found[0]).startswith(f"row 1: {name}: expected ")


def test_within_rounding_of_the_cut_either_expert_is_right() -> None:
    spec = RouterSpec(RouterPolicy(1), RouterWiring(4, combine_dtype="float32"))
    logits = np.array([[1.0, 1.0 + 1e-7, -1.0, -1.0], [1.0, 1.1, -1.0, -1.0]], np.float32)
    expected = route(logits, spec)
    swapped = route(logits[:, [1, 0, 2, 3]], spec)
    found = compare(expected, swapped, spec, logits)
    assert {d.row for d in found if d.field == "expert_ids"} == {1}
