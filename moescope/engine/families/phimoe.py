"""Phi-3.5-MoE: SparseMixer routing, LayerNorm with biases, and a rope that stretches by length.

Source: arXiv 2409.12136 and 2404.14219; transformers `modeling_phimoe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MoE, Norm


def phimoe(config: Fields) -> DecoderSpec:
    """What a weight is depends on the threshold that the jitter noise sets, also at inference."""
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8)
    rope = ropes.read_rope(
        config, sizes.head_dim, sizes.context, usual_theta=1e6, kinds=("default", "longrope")
    )
    bias = config.bool("attention_bias", False)
    window = config.int("sliding_window", 1, 1 << 30, 0)
    mixer = common.attention(sizes, rope, window=window, qkv_bias=bias, out_bias=bias)
    router = common.softmax_router(config, renormalises=False).with_policy(
        scoring_func="sparsemixer",
        score_dtype="model",
        router_jitter_noise=config.float("router_jitter_noise", 0.0, 1e3, 0.01),
    )
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    norm = Norm(sizes.hidden, sizes.eps, "layer", bias=True)
    layer = common.pre_norm_layer(sizes, mixer, moe, norm=norm)
    spec = common.decoder(sizes, [layer] * sizes.layers, final_norm=norm)
    return replace(spec, head_bias=config.bool("lm_head_bias", False))


FAMILIES = {
    "phimoe": Family(
        "Phi-3.5-MoE",
        phimoe,
        PRE_NORM_NAMES,
        "SparseMixer, two of them",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"},
        notes=(
            "beyond the original context transformers (5.23) goes on with the short frequencies; "
            "moescope takes the long ones, as the code published with the model does",
            "llama.cpp routes by a plain softmax over the two chosen instead of SparseMixer",
        ),
    ),
}
