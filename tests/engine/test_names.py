"""Names and forms: how tables are read, and what each form does to rows, by loops over indices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import forms
from moescope.engine.families.forms import FORMS, In
from moescope.engine.families.names import (
    PRE_NORM_NAMES,
    Constant,
    Dictionary,
    Names,
    Stack,
)
from moescope.engine.families.places import place
from moescope.engine.operators import MLA, Attention, LinearAttention, MoE, Norm, ShortConv
from moescope.engine.parameters import slots
from moescope.engine.quantised import Held
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

# --- forms ----------------------------------------------------------------------------------------

HEADS = Attention(8, heads=6, kv_heads=2, head_dim=4, scale=1.0, v_head_dim=2)
DELTA = LinearAttention(8, "gated_delta", 2, 4, 3, 5, 4, Norm(5))


def numbered(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def by_group(sizes: tuple[int, ...], groups: int) -> list[int]:
    """Rows of every first part, then of every second: where each lies, group after group."""
    rows = []
    for part in range(len(sizes)):
        for group in range(groups):
            start = group * sum(sizes) + sum(sizes[:part])
            rows += range(start, start + sizes[part])
    return rows


# form -> (ours, published shape, operator, published index of each of our elements)
CASES: dict[str, tuple[Any, ...]] = {
    "as stored": ((4, 3), (4, 3), None, lambda r, c: (r, c)),
    "transposed": ((4, 3), (3, 4), None, lambda r, c: (c, r)),
    "interleaved": ((6, 3), (6, 3), None, lambda r, c: (2 * (r % 3) + r // 3, c)),
    "transposed interleaved": ((6, 3), (3, 6), None, lambda r, c: (c, 2 * (r % 3) + r // 3)),
    "up first": ((6, 3), (6, 3), None, lambda r, c: ((r + 3) % 6, c)),
    "experts in rows": ((4, 3), (4, 3), None, lambda r, c: (r, c)),
    "experts in rows, transposed": ((4, 3), (3, 4), None, lambda r, c: (c, r)),
    "squeezed": ((4, 3), (4, 1, 3), None, lambda r, c: (r, 0, c)),
    "conv last": ((4, 3), (4, 3, 1), None, lambda r, c: (r, c, 0)),
    "one row": ((4,), (1, 4), None, lambda r: (0, r)),
    "scalar": ((1,), (), None, lambda r: ()),
    "inside ones": ((4,), (1, 1, 4, 1), None, lambda r: (0, 0, r, 0)),
    "qkv by group": (
        (36, 2),
        (36, 2),
        HEADS,
        lambda r, c: (by_group((12, 4, 2), 2)[r], c),
    ),
    "qkvz by key head": (
        (2 * 26, 2),
        (2 * 26, 2),
        DELTA,
        lambda r, c: (by_group((3, 3, 10, 10), 2)[r], c),
    ),
    "ba by key head": ((8, 2), (8, 2), DELTA, lambda r, c: (by_group((2, 2), 2)[r], c)),
}


def test_every_form_is_tested() -> None:
    assert {*CASES, "plus one"} == set(FORMS)


@pytest.mark.parametrize("name", CASES)
def test_forms_by_index(name: str) -> None:
    """In numpy and in torch, and the shape that is asked of a checkpoint."""
    shape, published, operator, index = CASES[name]
    stored = numbered(*published)
    expected = np.empty(shape, np.float32)
    for at in np.ndindex(*shape):
        expected[at] = stored[index(*at)]
    sizes = FORMS[name].sizes(operator)
    assert forms.stored_shape(name, shape) == published
    np.testing.assert_array_equal(forms.apply(name, stored, shape, sizes), expected)
    found = forms.apply(name, torch.from_numpy(stored), shape, sizes)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_one_less() -> None:
    stored = numbered(5)
    np.testing.assert_array_equal(forms.apply("plus one", stored, (5,)), stored - 1)


def test_forms_of_biases() -> None:
    """Rows move as those of the matrix; there is nothing to transpose."""
    bias = forms.apply("transposed interleaved", numbered(6), (6,))
    np.testing.assert_array_equal(bias, [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(forms.apply("up first", numbered(4), (4,)), [2, 3, 0, 1])


def test_shapes_of_stacks() -> None:
    assert forms.stored_shape("transposed", (8, 4, 3), 8) == (8, 3, 4)
    assert forms.stored_shape("experts in rows", (8, 4, 3), 8) == (32, 3)
    assert forms.stored_shape("experts in rows, transposed", (8, 3, 4), 8) == (32, 3)


def test_a_form_that_is_not_in_the_table() -> None:
    with pytest.raises(AssertionError):
        In("x", "sideways")


# --- names ----------------------------------------------------------------------------------------


def published(ours: str, names: Names, stored: tuple[str, ...] = ()) -> list[str]:
    return Dictionary(names, stored).published(ours)


def test_the_longest_beginning_wins() -> None:
    names = {**PRE_NORM_NAMES, "layers.{n}.attention.o_proj": "..mixer.out"}
    assert published("layers.7.attention.x.weight", names) == ["model.layers.7.self_attn.x.weight"]
    assert published("layers.7.attention.o_proj.weight", names) == [
        "model.layers.7.mixer.out.weight"
    ]
    assert published("unheard.of", names) == ["unheard.of"]


def test_dots_go_up_from_our_name() -> None:
    names = {
        "layers.{n}": "blocks.{n}",
        "layers.{n}.mlp": (".ffn", ".moe"),
        "layers.{n}.mlp.gate": ".router",
        "layers.{n}.mlp.gate.correction_bias": ("..bias", ".bias", "elsewhere.{n}"),
        "layers.{n}.mlp.pre_norm": "..norm_2",
    }
    assert published("layers.3.mlp.gate.weight", names) == [
        "blocks.3.ffn.router.weight",
        "blocks.3.moe.router.weight",
    ]
    assert published("layers.3.mlp.gate.correction_bias", names) == [
        "blocks.3.ffn.bias",
        "blocks.3.moe.bias",
        "blocks.3.ffn.router.bias",
        "blocks.3.moe.router.bias",
        "elsewhere.3",
    ]
    assert published("layers.3.mlp.pre_norm.weight", names) == ["blocks.3.norm_2.weight"]


@pytest.mark.parametrize(
    ("embedding", "layer", "head"),
    [
        ("model.embed_tokens", "model.layers.0.mlp", "lm_head"),
        (
            "model.language_model.embed_tokens",
            "model.language_model.layers.0.mlp",
            "lm_head",
        ),
        (
            "language_model.model.embed_tokens",
            "language_model.model.layers.0.mlp",
            "language_model.lm_head",
        ),
        ("thinker.model.embed_tokens", "thinker.model.layers.0.mlp", "thinker.lm_head"),
        ("embed_tokens", "layers.0.mlp", "lm_head"),
    ],
)
def test_what_stands_around_a_text_model(embedding: str, layer: str, head: str) -> None:
    found = Dictionary(PRE_NORM_NAMES, [f"{embedding}.weight", "visual.embed_tokens.weight"])
    assert found.published("layers.0.mlp")[0] == layer
    assert found.published("head") == [head]


# --- places ---------------------------------------------------------------------------------------

NORM = Norm(8)


def decoder(*branches: Branch) -> DecoderSpec:
    return DecoderSpec(16, 8, 32, (Layer(branches),), NORM, tied_head=True)


def laid_out(spec: DecoderSpec, names: Names, changes: dict[str, Any]) -> Any:
    """A plan for a checkpoint of tensors as we have them, but for `changes`: our name -> published
    names and shapes instead."""
    stored: dict[str, Held] = {}
    for slot in slots(spec):
        for part, rows in slot.parts:
            instead = changes.get(part, changes.get(slot.name))
            if instead is None:
                (name,) = Dictionary(names, ()).published(part)[:1]
                instead = {name: (rows, *slot.shape[1:])}
            stored |= {name: Held(shape, "x", "F32") for name, shape in instead.items()}
    return place(spec, names, {}, stored)


CONV = decoder(Branch("conv", ShortConv(8, 3), pre_norm=NORM))
CONV_NAMES: Names = {**PRE_NORM_NAMES, "layers.{n}.conv": ".conv"}


@pytest.mark.parametrize(
    ("shape", "form"), [((8, 1, 3), "squeezed"), ((8, 3, 1), "conv last"), ((8, 3), "as stored")]
)
def test_shapes_choose_the_form(shape: tuple[int, ...], form: str) -> None:
    plan = laid_out(
        CONV, CONV_NAMES, {"layers.0.conv.conv.weight": {"model.layers.0.conv.conv.weight": shape}}
    )
    (piece,) = next(p for p in plan.placements if p.target.endswith("conv.weight")).pieces
    assert piece.form == form and plan.unexpected == ()


def test_a_shape_of_no_form_is_refused() -> None:
    with pytest.raises(MoescopeError, match=r"conv\.weight is \[8, 1, 3\]; it is \[8, 2, 3\]"):
        laid_out(
            CONV,
            CONV_NAMES,
            {"layers.0.conv.conv.weight": {"model.layers.0.conv.conv.weight": (8, 2, 3)}},
        )


LATENT = decoder(Branch("attention", MLA(8, 2, 6, 3, 2, 4, 1.0, None), pre_norm=NORM))
KV_B = "layers.0.attention.kv_b_proj.weight"
ATTN = "model.layers.0.self_attn"


def test_a_stack_fills_rows_of_every_head() -> None:
    """As mlx-lm keeps it: keys [heads, latent, nope], turned, above values, head by head."""
    halves = {f"{ATTN}.embed_q.weight": (2, 6, 3), f"{ATTN}.unembed_out.weight": (2, 4, 6)}
    plan = laid_out(LATENT, PRE_NORM_NAMES, {KV_B: halves})
    keys, values = next(p for p in plan.placements if p.target == KV_B).pieces
    assert (keys.form, keys.blocks, keys.start, keys.stop) == ("transposed", 2, 0, 3)
    assert (values.form, values.blocks, values.start, values.stop) == ("as stored", 2, 3, 7)
    with pytest.raises(MoescopeError, match=r"unembed_out\.weight|kv_b_proj"):
        laid_out(
            LATENT, PRE_NORM_NAMES, {KV_B: {**halves, f"{ATTN}.unembed_out.weight": (2, 5, 6)}}
        )


def test_a_stack_without_blocks() -> None:
    names: Names = {
        **PRE_NORM_NAMES,
        "layers.{n}.attention.kv_b_proj": Stack(((".a", lambda m: 4), (".b", lambda m: 10))),
    }
    plan = laid_out(
        LATENT, names, {KV_B: {f"{ATTN}.a.weight": (4, 6), f"{ATTN}.b.weight": (10, 6)}}
    )
    first, second = next(p for p in plan.placements if p.target == KV_B).pieces
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 14)


def moe(**policy: Any) -> DecoderSpec:
    from moescope.engine.operators import Experts

    router = RouterSpec(RouterPolicy(2, **policy), RouterWiring(4))
    return decoder(Branch("mlp", MoE(8, router, Experts(6)), pre_norm=NORM))


EXPERTS = {
    f"model.layers.0.mlp.experts.{e}.{kind}_proj.weight": shape
    for e in range(4)
    for kind, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))
}
BIAS = "layers.0.mlp.gate.correction_bias"


@pytest.mark.parametrize(
    ("name", "shape", "form"),
    [
        ("mlp.gate.e_score_correction_bias", (4,), "as stored"),
        ("mlp.expert_bias", (4,), "as stored"),
        ("mlp.moe_statics.e_score_correction_bias", (1, 4), "one row"),
        ("mlp.experts.e_score_correction_bias", (4,), "as stored"),
    ],
)
def test_where_correction_biases_are(name: str, shape: tuple[int, ...], form: str) -> None:
    spec = moe(correction_bias="score")
    changes = {
        "layers.0.mlp.experts.gate_up": EXPERTS,
        "layers.0.mlp.experts.down": {},
        BIAS: {f"model.layers.0.{name}": shape},
    }
    plan = laid_out(spec, PRE_NORM_NAMES, changes)
    found = next(p for p in plan.placements if p.target == BIAS)
    assert found.pieces[0].form == form and found.dtype == "float32"


def test_a_tensor_that_may_be_absent() -> None:
    spec = moe(correction_bias="score")
    names: Names = {**PRE_NORM_NAMES, "layers.{n}.mlp.gate.correction_bias": (".x", Constant(0.5))}
    changes = {
        "layers.0.mlp.experts.gate_up": EXPERTS,
        "layers.0.mlp.experts.down": {},
        BIAS: {},
    }
    plan = laid_out(spec, names, changes)
    assert next(p for p in plan.placements if p.target == BIAS).constant == 0.5
    assert plan.notes() == [f"{BIAS}: not in the checkpoint; 0.5 throughout"]
    only_mlx = {**names, "layers.{n}.mlp.gate.correction_bias": (".x", Constant(0.5, mlx=True))}
    with pytest.raises(MoescopeError, match=r"gate\.x: expected a tensor, found none"):
        laid_out(spec, only_mlx, changes)


def test_what_is_left_over() -> None:
    """Heads, towers and layers beyond the last have a reason; a bias has none; a family may say."""
    spec = moe()
    changes = {"layers.0.mlp.experts.gate_up": EXPERTS, "layers.0.mlp.experts.down": {}}
    others = {
        "embed.weight": {
            "model.embed_tokens.weight": (16, 8),
            "model.layers.1.eh_proj.weight": (8, 16),
            "model.layers.61.mlp.gate.weight": (4, 8),
            "mtp.fc.weight": (8, 8),
            "model.visual.merger.weight": (2, 2),
            "lm_head.weight": (16, 8),
            "model.layers.0.mlp.gate.bias": (4,),
            "model.layers.0.self_attn.indexer.wk.weight": (2, 2),
        }
    }
    plan = laid_out(spec, PRE_NORM_NAMES, {**changes, **others})
    assert len(plan.unused) == 7 and plan.unexpected == (
        "model.layers.0.mlp.gate.bias",
        "model.layers.0.self_attn.indexer.wk.weight",
    )
    names = {**PRE_NORM_NAMES, "unread": ("*.indexer.*",)}
    plan = laid_out(spec, names, {**changes, **others})
    assert plan.unexpected == ("model.layers.0.mlp.gate.bias",)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shapes_are_placed_or_refused(data: st.DataObject) -> None:
    """Whatever a header says, the plan fits what it says, or there is a MoescopeError."""
    spec = replace(moe(correction_bias="score"), tied_head=data.draw(st.booleans()))
    stored = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (16, 8),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.gate.e_score_correction_bias": (4,),
        **EXPERTS,
    }
    sizes = st.lists(st.sampled_from([0, 1, 4, 6, 8, 12]), max_size=3).map(tuple)
    for name in data.draw(st.sets(st.sampled_from(sorted(stored)), max_size=3)):
        if data.draw(st.booleans()):
            del stored[name]
        else:
            stored[name] = data.draw(sizes)
    held = {name: Held(shape, "x", "F32") for name, shape in stored.items()}
    try:
        plan = place(spec, PRE_NORM_NAMES, {}, held)
    except MoescopeError as error:
        assert error.message
        return
    for placement in plan.placements:
        assert all(stored[piece.source] == piece.stored_shape for piece in placement.pieces)
