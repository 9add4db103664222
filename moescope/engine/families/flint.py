"""Flint and Kolibri 1: windows with positions beside full layers without, and sigmoid routing:
without a bias, or with one on the logits.

Sources: transformers `modeling_flint.py` and `modeling_kolibri1.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, MoE, Norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

CONTEXT, WINDOW = 262144, 513


def flint(config: Fields) -> DecoderSpec:
    """Each head has a sink; norms are multiplied, and attention scored, in float32."""
    sizes = common.read_sizes(config, eps=1e-6, context=CONTEXT, kv_heads=4, head_dim=128)
    bias = config.bool("attention_bias", False)
    sliding = common.attention(
        sizes,
        common.read_rope(config, sizes),
        window=config.int("sliding_window", 1, ropes.FAR, WINDOW),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
        norm_applies="float32",
    )
    last = sizes.layers - 1
    usual = [FULL if n < 2 or n % 4 == 1 or n == last else SLIDING for n in range(sizes.layers)]
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    mixers = biased.placed_in_windows(replace(sliding, sinks=True, float32_scores=True), types)
    policy = RouterPolicy(
        biased.read_counts(config, 6)[1],
        scoring_func="sigmoid",
        norm_topk_prob=config.bool("norm_topk_prob", True),
    )
    moe = _moe(config, sizes, policy, 1024)
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    blocks = biased.blocks(_sparse(config, sizes.layers), moe, biased.read_dense(config, sizes))
    layers = [
        common.pre_norm_layer(sizes, *pair, norm=norm) for pair in zip(mixers, blocks, strict=True)
    ]
    return common.decoder(sizes, layers, applies="float32")


def _sparse(config: Fields, layers: int) -> list[bool]:
    """By `decoder_sparse_step`, unless `mlp_only_layers` (usually the first two) names it."""
    step = config.int("decoder_sparse_step", 1, 1024, 1)
    dense = config.list("mlp_only_layers", int, default=[0, 1])
    return [number not in dense and (number + 1) % step == 0 for number in range(layers)]


def kolibri1(config: Fields) -> DecoderSpec:
    """Chosen by logit + bias, weighted by the sigmoid of the logit; norms on both sides."""
    sizes = common.read_sizes(config, eps=1e-6, context=CONTEXT, kv_heads=4, head_dim=128, width=0)
    sliding = common.attention(
        sizes,
        common.read_rope(config, sizes),
        window=config.int("sliding_window", 1, ropes.FAR, WINDOW),
        qk_norm="per_head",
    )
    usual = [SLIDING if (n + 1) % 5 else FULL for n in range(sizes.layers)]
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    policy = RouterPolicy(
        biased.read_counts(config, 6)[1],
        scoring_func="sigmoid",
        score_order="topk_then_score",
        correction_bias="logit",
        norm_topk_prob=config.bool("norm_topk_prob", False),
    )
    moe, norm = _moe(config, sizes, policy, 512), Norm(sizes.hidden, sizes.eps)

    def layer(mixer: Attention) -> Layer:
        return Layer((Branch("attention", mixer, norm, norm), Branch("mlp", moe, norm, norm)))

    return common.decoder(sizes, list(map(layer, biased.placed_in_windows(sliding, types))))


def _moe(config: Fields, sizes: common.Sizes, policy: RouterPolicy, usual: int) -> MoE:
    """With a shared expert of a width of its own, added as it is."""
    width = config.int("shared_expert_intermediate_size", 1, common.SIZE, usual)
    experts, _ = biased.read_counts(config, 6)
    wiring = RouterWiring(
        experts, router_dtype="float32", shared_experts=1, combine_dtype="float32"
    )
    return MoE(
        sizes.hidden,
        RouterSpec(policy, wiring),
        common.experts(config, config.int("moe_intermediate_size", 1, common.SIZE, 512)),
        MLP(sizes.hidden, width, common.read_activation(config)),
    )


_FLINT: Names = {**PRE_NORM_NAMES, "layers.{n}.attention.sinks": (".softmax_offset", ".sinks")}
_KOLIBRI: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention.post_norm": ("..post_attn_norm", "..post_self_attn_layernorm"),
    "layers.{n}.mlp.post_norm": ("..post_ffn_norm", "..post_mlp_layernorm"),
    "layers.{n}.mlp.gate.correction_bias": (
        "...moe.router.expert_bias",
        ".e_score_correction_bias",
    ),
}
FAMILIES = {
    "flint": Family("Flint", flint, _FLINT, "sigmoid, renormalised"),
    "kolibri1": Family(
        "Kolibri 1", kolibri1, _KOLIBRI, "biased choice by logits, sigmoid of the chosen"
    ),
}
