"""Rows of policies: that they say all a kernel needs, and that C reads them as they are written."""

from __future__ import annotations

import re
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, route
from moescope.kernels.policy_rows import COLUMN, COLUMNS, DTYPES, WIDTH, pack, pack_rows
from moescope.kernels.reference import E_MAX, K_MAX
from moescope.kernels.spec import Routing
from moescope.variants import CATALOGUE, applicable, apply
from tests.kernels.native_build import NATIVE
from tests.kernels.strategies import KINDS, rows_of, specs

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)
WORDS = {
    name: words
    for name, hint in get_type_hints(RouterPolicy).items()
    if (words := get_args(hint)) and isinstance(words[0], str)
}


def spec_of(E: int = 32, K: int = 4, **policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E, combine_dtype="float32"))


# --- what stands in a row -----------------------------------------------------------------------


def test_a_row_holds_each_field_in_its_column() -> None:
    spec = RouterSpec(
        RouterPolicy(
            6,
            logits_dtype="bfloat16",
            router_logit_scale=0.5,
            router_logit_softcapping=30.0,
            scoring_func="sigmoid",
            score_passes=2,
            score_dtype="float16",
            router_jitter_noise=0.01,
            correction_bias="score",
            correction_bias_dtype="bfloat16",
            n_group=8,
            topk_group=4,
            group_score="max",
            group_mask_fill="0",
            tie_break="higher_id",
            weights_from="biased_minus_bias",
            norm_topk_prob=True,
            norm_p=2.0,
            norm_eps=1e-20,
            norm_eps_mode="uniform",
            per_expert_scale=True,
            routed_scaling_factor=2.5,
            scale_power=2,
        ),
        RouterWiring(60, num_null_experts=4, null_expert_kind="skip", combine_dtype="bfloat16"),
    )
    row = pack(spec, gate=3)
    assert row.shape == (WIDTH,) and row.dtype == np.float64
    threshold = row[COLUMN["sparsemixer_threshold"]]
    assert threshold == np.float64(np.float16(np.float32(0.02)))
    row[COLUMN["sparsemixer_threshold"]] = 0
    assert row[: len(COLUMNS)].tolist() == [
        *(6, 1, 0.5, 30, 1, 0, 2, 2, 0),  # K to the threshold
        *(1, 1, 0),  # a bfloat16 bias on a float16 score is float32
        *(8, 4, 0, 1, 1, 2),  # groups, tie rule, weights_from
        *(1, 2, 1e-20, 2, 1, 6.25, 1, 1),  # normalisation, scales, combine dtype
        *(60, 0, 3),  # null experts weigh nothing, no table, gate
    ]
    assert not row[len(COLUMNS) :].any()


def test_a_factor_on_the_output_is_not_in_the_weights() -> None:
    row = pack(spec_of(routed_scaling_factor=3.0, scale_site="routed_output"))
    assert (row[COLUMN["weight_scale"]], row[COLUMN["output_scale"]]) == (1, 3)


def test_groups_that_limit_nothing_are_no_groups() -> None:
    plain = pack(spec_of())
    np.testing.assert_array_equal(pack(spec_of(n_group=4, topk_group=4)), plain)
    assert (pack(spec_of(n_group=4, topk_group=2)) != plain).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_one_number_in_every_dtype(dtype: str) -> None:
    policy = {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01, "score_dtype": dtype}
    found = pack(spec_of(16, 2, **policy))[COLUMN["sparsemixer_threshold"]]
    torch_like = {"float32": 0.02, "bfloat16": 0.02001953125, "float16": 0.0200042724609375}
    assert found == pytest.approx(torch_like[dtype], rel=1e-7)


def test_specs_that_no_kernel_takes_have_no_row() -> None:
    with pytest.raises(ValueError, match="combine_dtype is 'model'"):
        pack(RouterSpec(RouterPolicy(2), RouterWiring(8)))
    with pytest.raises(ValueError, match="num_experts 5000"):
        pack(spec_of(5000))


# --- words are numbers, each its own --------------------------------------------------------------

# What has to go with a word for it to mean something.
COMPANY: dict[str, dict[str, Any]] = {
    "weights_from": {"correction_bias": "score"},
    "group_score": {"n_group": 4, "topk_group": 2},
    "group_mask_fill": {"n_group": 4, "topk_group": 2},
}
ELSEWHERE = {"scale_site"}  # seen in where the factor stands


@pytest.mark.parametrize("name", sorted(set(WORDS) - ELSEWHERE))
def test_a_word_is_its_place_among_the_words_of_its_field(name: str) -> None:
    numbers = []
    words = [word for word in WORDS[name] if word != "model"]
    for word in words:
        K = 2 if word == "sparsemixer" else 4
        spec = spec_of(K=K, **COMPANY.get(name, {}), **{name: word})
        numbers.append(pack(spec)[COLUMN[name]])
    wanted = DTYPES if name.endswith("_dtype") else words
    assert numbers == [wanted.index(word) for word in words] and len(set(numbers)) == len(words)


# --- a row says everything ------------------------------------------------------------------------


def decides(spec: RouterSpec, kind: str, seed: int) -> Routing:
    rng = np.random.default_rng(seed)
    E = spec.E
    x = np.concatenate([rows_of(kind, 3, E, rng), rows_of("ties", 3, E, rng)])
    table = np.stack([rng.permutation(E) for _ in range(5)])
    bias = (rng.normal(size=E) - 2).astype(np.float32)
    return route(
        x,
        spec,
        correction_bias=bias,
        per_expert_scale=rng.uniform(0.5, 2, E).astype(np.float32),
        token_ids=rng.integers(0, 5, len(x)),
        hash_table=table,
    )


def same(a: Routing, b: Routing) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name not in _IDS)
        for name in Routing.__slots__
        if name != "logits"
    )


_IDS = ("expert_ids", "runner_up")
EDITS: dict[str, tuple[Any, ...]] = {
    **{name: tuple(w for w in words if w != "model") for name, words in WORDS.items()},
    "num_experts_per_tok": (1, 2, 3),
    "router_logit_scale": (1.0, 0.5),
    "router_logit_softcapping": (0.0, 2.0),
    "score_passes": (1, 2),
    "router_jitter_noise": (0.0, 0.01, 0.3),
    "n_group": (1, 2, 4),
    "topk_group": (1, 2, 4),
    "norm_topk_prob": (False, True),
    "norm_p": (1.0, 2.0),
    "norm_eps": (0.0, 1e-2),
    "per_expert_scale": (False, True),
    "routed_scaling_factor": (1.0, 2.5),
    "scale_power": (0, 1, 2),
    "gate_quant_bits": (0, 8),  # before the logits: the caller says which gate
}


def test_every_field_of_a_policy_is_edited() -> None:
    assert set(EDITS) == set(get_type_hints(RouterPolicy))


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[RouterSpec, RouterSpec]:
    """Two specs that differ in one field of the policy, or in the wiring a row knows of."""
    spec = draw(specs((4, 8, 16)))
    name = draw(st.sampled_from([*EDITS, "combine_dtype", "null_expert_kind", "hash_table"]))
    try:
        if name in EDITS:
            return spec, spec.with_policy(**{name: draw(st.sampled_from(EDITS[name]))})
        values = {
            "combine_dtype": DTYPES,
            "null_expert_kind": ("identity", "skip"),
            "hash_table": (False, True),
        }
        return spec, spec.with_wiring(**{name: draw(st.sampled_from(values[name]))})
    except ValueError:
        assume(False)
        raise


@PROPERTY
@given(neighbours(), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_specs_that_decide_otherwise_have_other_rows(
    pair: tuple[RouterSpec, RouterSpec], kind: str, seed: int
) -> None:
    left, right = pair
    if np.array_equal(pack(left), pack(right)):
        assert same(decides(left, kind, seed), decides(right, kind, seed))


GROUPED = {
    "scoring_func": "sigmoid",
    "correction_bias": "score",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
SPARSE = {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01}
TELLING = [
    ({}, {"num_experts_per_tok": 3}),
    ({}, {"logits_dtype": "bfloat16"}),
    ({}, {"router_logit_scale": 1.001}),
    ({}, {"router_logit_softcapping": 30.0}),
    ({}, {"scoring_func": "sqrtsoftplus"}),
    ({}, {"score_order": "topk_then_score"}),
    ({}, {"score_passes": 2}),
    ({}, {"score_dtype": "float16"}),
    (SPARSE, {"router_jitter_noise": 0.02}),
    ({"scoring_func": "sigmoid"}, {"correction_bias": "logit"}),
    (GROUPED, {"correction_bias_dtype": "bfloat16"}),
    (GROUPED, {"n_group": 8}),
    (GROUPED, {"topk_group": 3}),
    (GROUPED, {"group_score": "max"}),
    (GROUPED, {"group_mask_fill": "0"}),
    ({}, {"tie_break": "higher_id"}),
    (GROUPED, {"weights_from": "biased_scores"}),
    (GROUPED, {"norm_topk_prob": False}),
    (GROUPED, {"norm_p": 2.0}),
    (GROUPED, {"norm_eps": 1e-3}),
    ({**GROUPED, "norm_eps": 1e-2}, {"norm_eps_mode": "clamp"}),
    ({}, {"per_expert_scale": True}),
    (GROUPED, {"routed_scaling_factor": 2.4}),
    (GROUPED, {"scale_power": 2}),
    (GROUPED, {"scale_site": "routed_output"}),
]


def test_the_edits_that_tell_name_every_field_a_router_reads() -> None:
    assert {name for _, edit in TELLING for name in edit} == set(EDITS) - {"gate_quant_bits"}


@pytest.mark.parametrize(("policy", "edit"), TELLING, ids=str)
def test_an_edit_that_changes_the_decision_changes_the_row(
    policy: dict[str, Any], edit: dict[str, Any]
) -> None:
    before = spec_of(K=2 if policy is SPARSE else 4, **policy)
    after = before.with_policy(**edit)
    kinds = ("normal", "wide", "negative")
    assert any(not same_shaped(decides(before, k, 3), decides(after, k, 3)) for k in kinds)
    assert (pack(before) != pack(after)).any()


def same_shaped(a: Routing, b: Routing) -> bool:
    return a.expert_ids.shape == b.expert_ids.shape and same(a, b)


def test_variants_that_differ_have_rows_that_differ() -> None:
    spec = spec_of(64, 8, **{**GROUPED, "n_group": 8, "topk_group": 4})
    names = [
        name
        for name, variant in CATALOGUE.items()
        if not (variant.wiring or variant.decoder or "gate_quant_bits" in variant.policy)
        and variant.seen != "none"
        and applicable(name, spec)
    ]
    rows = pack_rows([apply(name, spec, 0) for name in names])
    assert len(names) > 10 and len(np.unique(rows, axis=0)) == len(names)


# --- what C calls them --------------------------------------------------------------------------

HEADER = (NATIVE / "router.h").read_text()
SPELLED = {"-inf": "minus_inf"}


def enum(name: str, header: str = HEADER) -> list[str]:
    """The enumerators of `enum name`, all of them counted from 0."""
    body = re.search(
        rf"enum {name} \{{(.*?)\}};", re.sub(r"/\*.*?\*/", "", header, flags=re.S), re.S
    )
    assert body, name
    members = [member.strip() for member in body[1].split(",") if member.strip()]
    assert all(re.fullmatch(r"MK_[A-Z0-9_]+", member) for member in members)
    return members


def test_the_columns_of_the_header_are_the_columns_of_a_row() -> None:
    wanted = [f"MK_COL_{name}".upper() for name in COLUMNS]
    assert enum("mk_column") == [*wanted, "MK_COLS"]
    limits = dict(re.findall(r"(MK_\w+) = (\d+)", HEADER))
    assert int(limits["MK_POLICY_WIDTH"]) == WIDTH >= len(COLUMNS)
    assert int(limits["MK_EXPERTS_MAX"]) == E_MAX and int(limits["MK_PICKS_MAX"]) == K_MAX


@pytest.mark.parametrize(
    "name", sorted(n for n in WORDS if n in COLUMN and not n.endswith("_dtype"))
)
def test_the_words_of_the_header_are_the_words_of_the_field(name: str) -> None:
    wanted = [f"MK_{name}_{SPELLED.get(word, word)}".upper() for word in WORDS[name]]
    assert enum(f"mk_{name}") == wanted


def test_the_dtypes_of_the_header_are_those_of_a_row() -> None:
    header = (NATIVE / "moescope_kernels.h").read_text()
    found = re.search(r"enum \{ (MK_FLOAT32.*?) \};", header)
    assert found and found[1].split(", ")[:3] == [f"MK_{name}".upper() for name in DTYPES]
