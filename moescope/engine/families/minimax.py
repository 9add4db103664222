"""MiniMax-M2: flat norms on queries and keys, partly turned heads, sigmoid routing with a bias.

Source: transformers `modeling_minimax_m2.py`. Its gate's product is in the model's dtype.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MoE
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring


def minimax_m2(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=196608, kv_heads=8, head_dim=128)
    _refuse_others(config)
    turned = config.int("rotary_dim", 2, sizes.head_dim, sizes.head_dim)
    rope = ropes.read_rope(
        config,
        sizes.head_dim,
        sizes.context,
        usual_theta=5e6,
        partial=turned / sizes.head_dim,
    )
    mixer = common.attention(sizes, rope, qk_norm="flat")
    experts, chosen = biased.read_counts(config, 8)
    policy = RouterPolicy(
        chosen, scoring_func="sigmoid", correction_bias="score", norm_topk_prob=True
    )
    router = RouterSpec(policy, RouterWiring(experts, combine_dtype="float32"))
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    return biased.decoder(sizes, [mixer] * sizes.layers, [moe] * sizes.layers)


def _refuse_others(config: Fields) -> None:
    """What the released configs say and transformers does not read."""
    config.str("scoring_func", ("sigmoid",), default="sigmoid")
    config.str("qk_norm_type", ("per_layer",), default="per_layer")
    for name in ("use_routing_bias", "use_qk_norm"):
        if not config.bool(name, True):
            raise config.error(name, "true")
    if set(config.list("attn_type_list", int, default=[1])) - {1}:
        raise config.error("attn_type_list", "1 for every layer")
    for name in ("shared_intermediate_size", "sliding_window"):
        if config.int(name, 0, ropes.FAR, 0):
            raise config.error(name, "0")


_GATE = (
    "the gate's product is in the model's dtype, as in transformers; mlx-lm and vLLM take it in "
    "float32, so in bfloat16 near ties may fall otherwise"
)
FAMILIES = {
    "minimax_m2": Family(
        "MiniMax-M2",
        minimax_m2,
        PRE_NORM_NAMES,
        "sigmoid, biased choice, renormalised",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"},
        (_GATE,),
    ),
}
