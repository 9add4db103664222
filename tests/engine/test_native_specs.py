"""The C step on decoders that no family has: operators with every field drawn, against torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine import families
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.native_limits import why_beside
from moescope.engine.operators import MLA, MLP, Attention, Experts, MoE, Norm, Rope
from moescope.kernels import native_ops as native
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from tests.engine.native_cases import agree, pair

H, HEADS, E = 24, 4, 6  # no multiple of any vector's width
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C library, no compiler")
yes_or_no = st.booleans()


def either(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def norms(draw: st.DrawFn, width: int, *, gated: bool = False, bare: bool = False) -> Norm:
    if bare:
        return Norm(width, draw(either(1e-6, 0.1)), draw(either("rms", "l2")), weight=False)
    kind = draw(either("rms", "rms", "rms_zero_centred", "layer", "l2"))
    return Norm(
        width,
        draw(either(1e-6, 0.1)),
        kind,
        weight=kind != "l2",
        bias=kind == "layer" and draw(yes_or_no),
        applies=draw(either("model", "float32")),
        gate_rank=draw(either(0, 5)) if gated else 0,
    )


def ropes(dims: int) -> st.SearchStrategy[Rope | None]:
    one = st.builds(
        Rope,
        st.just(100.0),
        either(dims, dims // 2),
        either("half", "interleaved"),
        applies=either("model", "float32"),
    )
    return st.none() | one


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    D, kv_heads = draw(either(8, 12)), draw(either(1, 2, 4))
    kinds = ("none", "in_q_proj", "sigmoid", "softplus", "sigmoid_per_head", "softplus_per_head")
    gate = draw(either(*kinds))
    same = gate in ("in_q_proj", "sigmoid", "softplus") or draw(yes_or_no)
    flat = draw(yes_or_no)
    qk_norm = draw(st.none() | norms(HEADS * D if flat else D))
    return Attention(
        *(H, HEADS, kv_heads, D, D**-0.5, draw(ropes(D))),
        **draw(either({}, {"window": 3}, {"chunk": 4})),
        v_head_dim=0 if same else 6,
        qkv_bias=draw(yes_or_no),
        out_bias=draw(yes_or_no),
        qk_norm=qk_norm,
        kv_norm=replace(qk_norm, width=kv_heads * D) if flat and qk_norm else None,
        qk_norm_over="flat" if flat else "per_head",
        qk_norm_after_rope=draw(yes_or_no),
        v_norm=draw(st.none() | norms(D if same else 6, bare=True)),
        clip_qkv=draw(either(None, 0.7)),
        sinks=draw(yes_or_no),
        float32_scores=draw(yes_or_no),
        softcap=draw(either(0.0, 2.0)),
        gate=gate,
        gate_bias=gate not in ("none", "in_q_proj") and draw(yes_or_no),
        keys_are_values=same and draw(yes_or_no),
        value_scale=draw(either(1.0, 0.6)),
        temperature_scale=draw(either(0.0, 0.3)),
        temperature_floor=3,
        temperature_kind=draw(either("log", "power")),
    )


@st.composite
def latents(draw: st.DrawFn) -> MLA:
    rank = draw(either(0, 10))
    turned = draw(st.none() | st.builds(Rope, st.just(50.0), st.just(6), either("interleaved")))
    return MLA(
        *(H, HEADS, 18, draw(either(7, 16)), 6, draw(either(5, 20)), 0.3, turned, rank),
        latent_norm=draw(st.none() | norms(18)),
        q_latent_norm=draw(st.none() | norms(rank)) if rank else None,
        q_latent_scale=draw(either(1.0, 1.4)),
        kv_latent_scale=draw(either(1.0, 0.7)),
        bias=draw(yes_or_no),
        q_reads_raw=bool(rank) and draw(yes_or_no),
        gate=draw(either("none", "in_q_proj", "sigmoid_per_head")),
        temperature_scale=draw(either(0.0, 0.4)),
        temperature_floor=2,
    )


def blocks() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "activation": either("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"),
            "glu": yes_or_no,
            "bias": yes_or_no,
            "limit": either(0.0, 0.8),
            "limit_site": either("before", "after"),
            "alpha": either(1.0, 1.7),
            "up_shift": either(0.0, 1.0),
        }
    )


@st.composite
def experts(draw: st.DrawFn) -> MoE:
    null = draw(either("none", "identity", "skip"))
    shared = draw(st.none() | st.builds(lambda says: MLP(H, 20, **says), blocks()))
    sites = either("none", "score", "logit")
    policy = RouterPolicy(
        2,
        scoring_func=draw(either("softmax", "sigmoid")),
        correction_bias=draw(sites),
        norm_topk_prob=draw(yes_or_no),
        per_expert_scale=draw(yes_or_no),
        routed_scaling_factor=1.5,
        scale_site=draw(either("weights", "routed_output")),
    )
    wiring = RouterWiring(
        E,
        2 if null != "none" else 0,
        null,
        router_input=draw(either("normed", "residual", "residual_rms_scaled")),
        router_dtype=draw(either("model", "float32")),
        gate_bias=draw(yes_or_no),
        shared_experts=int(shared is not None),
        shared_expert_gate=draw(either("none", "sigmoid")) if shared else "none",
        shared_combination=draw(either("add", "average")) if shared else "add",
        apply_router_weight_on_input=draw(yes_or_no),
        combine_dtype=draw(either("model", "float32")),
        moe_latent_size=(latent := draw(either(0, 10)) if null == "none" else 0),
    )
    return MoE(
        H,
        RouterSpec(policy, wiring),
        Experts(22, hidden=latent, **draw(blocks())),
        shared,
        output_bias=draw(yes_or_no),
        router_norm=Norm(H, weight=False) if wiring.router_input == "residual_rms_scaled" else None,
        sums_in_float32=draw(yes_or_no),
    )


@st.composite
def decoders(draw: st.DrawFn) -> DecoderSpec:
    """One layer of a mixer, a dense block and experts, over taps or not."""
    tapped = draw(yes_or_no)

    def branch(name: str, operator: Any, **says: Any) -> Branch:
        return Branch(
            name,
            operator,
            draw(st.none() | norms(H, gated=True)),
            draw(st.none() | norms(H)),
            multiplier=draw(either(1.0, 0.5)),
            keeps=draw(either(1.0, 0.9)),
            learned_sum=draw(yes_or_no),
            **says,
        )

    mixer = draw(attentions() | latents())
    dense = MLP(H, 30, **draw(blocks()))
    layer = Layer(
        (
            branch("mixer", mixer),
            branch("mlp", dense, adds_to="side" if tapped else "residual"),
            branch("moe", draw(experts()), reads="side" if tapped else "residual"),
        ),
        learned_scale=draw(yes_or_no),
    )
    return DecoderSpec(
        *(100, H, 64, (layer,), draw(st.none() | norms(H))),
        tied_head=draw(yes_or_no),
        head_bias=draw(yes_or_no),
        norm_head=draw(yes_or_no),
        embedding_scale=draw(either(1.0, 2.5)),
        learned_embedding=draw(yes_or_no),
        residual_dtype=draw(either("model", "float32")),
        logit_scale=draw(either(1.0, 0.3)),
        logit_softcap=draw(either(0.0, 3.0)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(decoders())
def test_every_field_of_an_operator_is_that_of_torch(spec: DecoderSpec) -> None:
    """Two lanes, one with a prompt: wholly in C, and float32 agrees to the last digits."""
    models = pair(families.resolved(spec, "float32"), lanes=2, capacity=16)
    router = 0
    for _, branch in spec.operators():
        assert why_beside(models[1].shared, branch.operator, router) == ""
    for model in models:
        model.run([1], np.array([[5, 9, 77, 3, 8]]))
    for token in (7, 50, 3):
        outs = [model.run([0, 1], np.full((2, 1), token), record="logits") for model in models]
        agree(*outs)
        assert np.isfinite(outs[0].logits).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(decoders())
def test_every_field_rounds_where_torch_rounds(spec: DecoderSpec) -> None:
    """In bfloat16 most logits of the first token are equal to the bit."""
    models = pair(families.resolved(spec, "bfloat16"), "bfloat16", capacity=16)
    a, b = (model.run([0], np.array([[11]])).logits for model in models)
    assert (a == b).mean() > 0.8
