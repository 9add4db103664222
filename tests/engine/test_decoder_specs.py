"""`DecoderSpec` holds decoders that this version does not run yet: each is written down here from a
config, validates, and has the parameters that transformers counts. Nothing is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moescope.engine import parameters
from moescope.engine.decoder import Branch, DecoderSpec, Layer, state_bytes
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    Experts,
    LinearAttention,
    MoE,
    Norm,
    Pass,
    Rope,
    RopeScaling,
    RoutedAttention,
    StateSpace,
)
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

H, V, CONTEXT = 64, 256, 128
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def jetmoe() -> DecoderSpec:
    """Attention and feed-forward are both routed; a bias is added after each weighted sum."""
    norm = Norm(H, 1e-6)
    router = RouterSpec(
        RouterPolicy(2, score_order="topk_then_score"), RouterWiring(4)
    )  # the score order makes the weights sum to 1
    mixer = RoutedAttention(H, router, 2, 16, 16**-0.5, Rope(10000.0, 16), output_bias=True)
    moe = MoE(H, router, Experts(96), output_bias=True)
    layer = Layer((Branch("attention", mixer, norm), Branch("mlp", moe, norm)))
    return DecoderSpec(V, H, CONTEXT, (layer,) * 2, norm, tied_head=True)


def longcat_flash() -> DecoderSpec:
    """Two latent attentions and two dense blocks a layer; the experts work on a shortcut that is
    added at the end, and six real experts stand beside three that give back their input."""
    norm = Norm(H, 1e-5)
    router = RouterSpec(
        RouterPolicy(3, correction_bias="score", routed_scaling_factor=6.0, scale_site="weights"),
        RouterWiring(6, 3, "identity", router_dtype="float32"),
    )
    mla = MLA(
        H, 4, 16, 12, 8, 10, 20**-0.5, Rope(1e7, 8, "interleaved"), 24, Norm(16), Norm(24),
        (H / 24) ** 0.5, (H / 16) ** 0.5,
    )  # fmt: skip
    mlp = MLP(H, 96)
    layer = Layer(
        (
            Branch("attention_0", mla, norm),
            Branch("normed", Pass(), norm, adds_to="normed"),
            Branch("moe", MoE(H, router, Experts(40)), reads="normed", adds_to="shortcut"),
            Branch("mlp_0", mlp, reads="normed"),
            Branch("attention_1", mla, norm),
            Branch("mlp_1", mlp, norm),
            Branch("join", Pass(), reads="shortcut"),
        )
    )
    return DecoderSpec(V, H, CONTEXT, (layer,) * 2, norm)


def gemma4_text() -> DecoderSpec:
    """Sandwich norms, a dense block and experts side by side with norms of their own and one norm
    over their sum, a router on the residual, heads that differ by layer, keys used as values."""
    norm, bare = Norm(H), Norm(16, weight=False)
    sliding = Attention(H, 4, 2, 16, 1.0, Rope(1e4, 16), 1024, qk_norm=Norm(16), v_norm=bare)
    full = Attention(
        H, 4, 1, 32, 1.0, Rope(1e6, 32, scaling=RopeScaling("proportional")),
        qk_norm=Norm(32), v_norm=Norm(32, weight=False), keys_are_values=True,
    )  # fmt: skip
    router = RouterSpec(
        RouterPolicy(2, norm_topk_prob=True, per_expert_scale=True),
        RouterWiring(8, router_input="residual_rms_scaled"),
    )
    moe = MoE(H, router, Experts(40, "gelu_tanh"))
    blocks = (
        Branch("mlp", MLP(H, 96, "gelu_tanh"), norm, norm, adds_to="feed_forward"),
        Branch("moe", moe, norm, norm, adds_to="feed_forward"),
        Branch("join", Pass(), None, norm, reads="feed_forward"),
    )
    layers = tuple(
        Layer((Branch("attention", mixer, norm, norm), *blocks), learned_scale=True)
        for mixer in (sliding, sliding, sliding, full)
    )
    return DecoderSpec(
        V, H, CONTEXT, layers, norm, tied_head=True, embedding_scale=H**0.5, logit_softcap=30.0
    )


def nemotron_h() -> DecoderSpec:
    """One operator a layer: mamba-2, dense, attention without positions, experts without a gate."""
    norm = Norm(H, 1e-5)
    router = RouterSpec(
        RouterPolicy(2, scoring_func="sigmoid", correction_bias="score", norm_topk_prob=True,
                     norm_eps=1e-20, routed_scaling_factor=2.5),
        RouterWiring(6, router_dtype="float32", shared_experts=1),
    )  # fmt: skip
    mamba = StateSpace(
        H, "mamba2", 64, 16, 4, heads=8, head_dim=8, groups=2, gated_norm=Norm(64, 1e-5)
    )
    operators = (
        mamba,
        MLP(H, 96, "relu2", glu=False),
        Attention(H, 4, 2, 16, 16**-0.5),
        MoE(H, router, Experts(40, "relu2", glu=False), MLP(H, 48, "relu2", glu=False)),
    )
    layers = tuple(Layer((Branch("mixer", operator, norm),)) for operator in operators)
    return DecoderSpec(V, H, CONTEXT, layers, norm)


def qwen3_next() -> DecoderSpec:
    """Three gated delta layers to one of gated attention, zero-centred norms, a shared expert."""
    norm = Norm(H, kind="rms_zero_centred")
    router = RouterSpec(
        RouterPolicy(2, norm_topk_prob=True),
        RouterWiring(6, shared_experts=1, shared_expert_gate="sigmoid"),
    )
    moe = Branch("mlp", MoE(H, router, Experts(40), MLP(H, 48)), norm)
    linear = LinearAttention(H, "gated_delta", 2, 4, 8, 12, 4, Norm(12))
    full = Attention(
        H, 4, 2, 16, 16**-0.5, Rope(1e4, 4), qk_norm=Norm(16, kind="rms_zero_centred"),
        gate="in_q_proj",
    )  # fmt: skip
    mixers = (linear, linear, linear, full)
    layers = tuple(Layer((Branch("attention", mixer, norm), moe)) for mixer in mixers)
    return DecoderSpec(V, H, CONTEXT, layers, norm)


def deepseek_v3() -> DecoderSpec:
    """Latent attention, grouped sigmoid routing with a correction bias, dense layers first."""
    return deepseek(
        V, H, 3, 4, MLA(H, 4, 16, 12, 8, 10, 20**-0.5, Rope(1e4, 8, "interleaved"), 24,
                        Norm(16), Norm(24)),
        dense=(1, 96), experts=(8, 3, 40, 2), groups=(4, 2),
    )  # fmt: skip


def deepseek(
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    mla: MLA,
    *,
    dense: tuple[int, int],
    experts: tuple[int, int, int, int],
    groups: tuple[int, int],
) -> DecoderSpec:
    norm = Norm(hidden)
    count, chosen, width, shared = experts
    router = RouterSpec(
        RouterPolicy(chosen, scoring_func="sigmoid", correction_bias="score", n_group=groups[0],
                     topk_group=groups[1], norm_topk_prob=True, norm_eps=1e-20,
                     routed_scaling_factor=2.5),
        RouterWiring(count, router_dtype="float32", shared_experts=shared),
    )  # fmt: skip
    moe = MoE(hidden, router, Experts(width), MLP(hidden, width * shared))
    mlp = MLP(hidden, dense[1])
    return DecoderSpec(
        vocab,
        hidden,
        163840,
        tuple(
            Layer(
                (Branch("attention", mla, norm), Branch("mlp", mlp if n < dense[0] else moe, norm))
            )
            for n in range(layers)
        ),
        norm,
    )


# builder, what transformers calls the same sizes, and elements it allocates but never uses
TABLE: dict[str, tuple[Any, dict[str, Any], int]] = {
    "jetmoe": (
        jetmoe,
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16,
         "num_local_experts": 4, "num_experts_per_tok": 2},
        0,
    ),
    "longcat_flash": (
        longcat_flash,
        {"num_layers": 2, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_lora_rank": 16,
         "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
         "head_dim": 8, "n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 3,
         "ffn_hidden_size": 96, "expert_ffn_hidden_size": 40},
        2 * 3 * 80 * 64,  # matrices of the experts that give back their input
    ),
    "gemma4_text": (
        gemma4_text,
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "global_head_dim": 32, "num_global_key_value_heads": 1, "enable_moe_block": True,
         "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 40,
         "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        0,
    ),
    "nemotron_h": (
        nemotron_h,
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "hybrid_override_pattern": "M-*E", "mamba_num_heads": 8, "mamba_head_dim": 8,
         "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "n_routed_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
         "moe_shared_expert_intermediate_size": 48, "n_group": 1, "topk_group": 1},
        0,
    ),
    "qwen3_next": (
        qwen3_next,
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 40,
         "shared_expert_intermediate_size": 48},
        0,
    ),
    "deepseek_v3": (
        deepseek_v3,
        {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
         "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
         "topk_group": 2, "moe_intermediate_size": 40, "n_shared_experts": 2,
         "first_k_dense_replace": 1},
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", TABLE)
def test_parameters_are_those_of_transformers(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    build, sizes, unused = TABLE[model_type]
    config = AutoConfig.for_model(model_type, **{**SMALL, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    learned = [p.numel() for p in model.parameters()]
    kept = ("e_score_correction_bias", "layer_scalar")
    learned += [b.numel() for name, b in model.named_buffers() if name.endswith(kept)]
    assert parameters.count(build()) == sum(learned) - unused


@pytest.mark.parametrize("model_type", TABLE)
def test_specs_are_values(model_type: str) -> None:
    build = TABLE[model_type][0]
    spec = build()
    assert spec == build() and hash(spec) == hash(build())
    assert spec.routers() and parameters.count_active(spec) < parameters.count(spec)
    names = [slot.name for slot in parameters.slots(spec)]
    assert len(names) == len(set(names))


def test_deepseek_v3_as_published() -> None:
    """671 billion parameters, and 576 numbers of latent a token and layer."""
    mla = MLA(
        7168, 128, 512, 128, 64, 128, 192**-0.5, Rope(1e4, 64, "interleaved"), 1536, Norm(512),
        Norm(1536),
    )  # fmt: skip
    spec = deepseek(
        129280, 7168, 61, 128, mla, dense=(3, 18432), experts=(256, 8, 2048, 1), groups=(8, 4)
    )
    assert parameters.count(spec) / 1e9 == pytest.approx(671.0, abs=0.1)
    assert parameters.count_active(spec) / 1e9 == pytest.approx(36.6, abs=0.3)
    assert state_bytes(spec, 10, 2) == 10 * 61 * 576 * 2


def test_states_that_do_not_grow() -> None:
    spec = nemotron_h()
    assert state_bytes(spec, 1000, 2) - state_bytes(spec, 999, 2) == 2 * 2 * 2 * 16
    kinds = {s.name: s.growth for _, b in spec.operators() for s in b.operator.state()}
    assert kinds == {"convolution": "fixed", "recurrent": "fixed", "kv": "per_token"}


def test_routers_in_order() -> None:
    assert [name for _, name, _ in jetmoe().routers()] == ["attention", "mlp"] * 2
    assert [layer for layer, _, _ in deepseek_v3().routers()] == [1, 2]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda b: replace(b, reads="nowhere"), "reads 'nowhere', which nothing has written"),
        (lambda b: replace(b, pre_norm=Norm(65)), "norm of width 65, hidden is 64"),
        (lambda b: replace(b, adds_to="nowhere"), "no branch adds to the residual"),
        (lambda b: replace(b, operator=MLP(65, 96)), "hidden 65, the decoder has 64"),
        (lambda b: replace(b, operator=Attention(H, 4, 3, 16, 0.25)), "4 heads do not divide"),
        (
            lambda b: replace(b, operator=Attention(H, 4, 2, 16, 0.25, window=4, chunk=4)),
            "window and chunk exclude",
        ),
        (
            lambda b: replace(b, operator=Attention(H, 4, 2, 16, 0.25, Rope(1e4, 5))),
            "rope over 5 dims",
        ),
    ],
)
def test_wiring_mistakes_are_caught(edit: Any, says: str) -> None:
    branch = Branch("mlp", MLP(H, 96), Norm(H))
    with pytest.raises(ValueError, match=says):
        DecoderSpec(V, H, CONTEXT, (Layer((edit(branch),)),), Norm(H))
    with pytest.raises(ValueError, match="the name is used twice"):
        DecoderSpec(V, H, CONTEXT, (Layer((branch, branch)),), Norm(H))
