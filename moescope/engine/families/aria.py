"""Aria's text: the chosen logits are scored, in the model's dtype; shared experts in one block.

Source: transformers `modeling_aria.py`. Experts are SiLU whatever `hidden_act` is.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.families.family import Family
from moescope.engine.families.layouts import FC, TRANSPOSED
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLP, Experts, MoE

_NAMES = {"moe_num_experts": "num_experts", "moe_topk": "num_experts_per_tok"}


def aria(config: Fields) -> DecoderSpec:
    config = config.renamed(_NAMES)
    sizes = common.read_sizes(config, eps=1e-6, context=2048, width=4096)
    bias = config.bool("attention_bias", False)
    rope = common.read_rope(config, sizes)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias)
    count = config.int("moe_num_shared_experts", 1, common.COUNT, 2)
    router = common.softmax_router(config, renormalises=False)
    router = router.with_policy(score_order="topk_then_score", score_dtype="model")
    router = router.with_wiring(shared_experts=count)
    activation, with_bias = common.read_activation(config), config.bool("mlp_bias", False)
    shared = MLP(sizes.hidden, sizes.width * count, activation, bias=with_bias)
    moe = MoE(sizes.hidden, router, Experts(sizes.width), shared)
    return common.decoder(sizes, [common.pre_norm_layer(sizes, mixer, moe)] * sizes.layers)


FAMILIES = {
    "aria_text": Family(
        "Aria",
        aria,
        {**PRE_NORM_NAMES, "layers.{n}.mlp.experts": (FC, TRANSPOSED)},
        "softmax of the chosen logits",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "moe_num_experts"},
    ),
}
