"""gpt-oss: a router with a bias, scored after the choice; attention sinks, biases everywhere, and a
clamped SwiGLU.

Source: arXiv 2508.10925; transformers `modeling_gpt_oss.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.layouts import GPT_OSS
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import Experts, MoE, Norm


def gpt_oss(config: Fields) -> DecoderSpec:
    """Sliding and full layers alternate where the config does not say which is which."""
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8, head_dim=64)
    rope = common.read_rope(config, sizes, usual_theta=150000.0)
    bias = config.bool("attention_bias", True)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias)
    usual = [FULL if n % 2 else SLIDING for n in range(sizes.layers)]
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    window = config.int("sliding_window", 1, 1 << 30, 128)
    mixers = {
        FULL: replace(mixer, sinks=True),
        SLIDING: replace(mixer, sinks=True, window=window),
    }
    router = common.softmax_router(config, renormalises=False).with_policy(
        score_order="topk_then_score", score_dtype="model"
    )
    common.read_activation(config)
    experts = Experts(
        sizes.width,
        "swiglu_oai",
        bias=True,
        limit=config.float("swiglu_limit", 0.0, 1e6, 7.0),
        alpha=config.float("swiglu_alpha", 0.0, 1e6, 1.702),
        up_shift=1.0,
    )
    moe = MoE(sizes.hidden, router.with_wiring(gate_bias=True), experts)
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    layers = [common.pre_norm_layer(sizes, mixers[kind], moe, norm=norm) for kind in types]
    return common.decoder(sizes, layers, final_norm=norm)


FAMILIES = {
    "gpt_oss": Family(
        "gpt-oss",
        gpt_oss,
        {**PRE_NORM_NAMES, "layers.{n}.mlp.experts": GPT_OSS},
        "softmax over the chosen",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"},
        notes=(
            "mlx-lm (0.32) rounds the bounds of YaRN's ramp where `truncate` is false; "
            "transformers, and moescope, do not",
            "the chosen are scored in the model's dtype, as in transformers; mlx-lm scores them in "
            "float32, so in bfloat16 weights differ by a rounding",
        ),
    ),
}
