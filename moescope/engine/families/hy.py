"""Hy3: sigmoid routing with a bias over grouped attention; routed and shared experts are added in
float32.

Source: transformers `modeling_hy_v3.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

THETA = 11158840.0


def hy_v3(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8, head_dim=128)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(
        sizes,
        common.read_rope(config, sizes, usual_theta=THETA),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
    )
    bias = config.bool("mlp_bias", False)
    moe = replace(
        biased.read_moe(config, sizes, _router(config), bias=bias),
        sums_in_float32=config.bool("enable_moe_fp32_combine", True),
    )
    sparse = biased.typed_layers(config, sizes.layers, 1)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes, bias=bias))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def _router(config: Fields) -> RouterSpec:
    for name in ("route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        if not config.bool(name, True):
            raise config.error(name, "true")
    experts, chosen = biased.read_counts(config, 8)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        correction_bias="score",
        norm_topk_prob=True,
        norm_eps=1e-20,
        routed_scaling_factor=config.float("router_scaling_factor", 0.0, 1e6, 2.826),
    )
    wiring = RouterWiring(
        experts,
        router_dtype="float32",
        shared_experts=biased.read_shared_count(config, 1),
        combine_dtype="float32",
    )
    return RouterSpec(policy, wiring)


FAMILIES = {
    "hy_v3": Family(
        "Hy3", hy_v3, PRE_NORM_NAMES, "sigmoid, biased choice, renormalised and scaled"
    ),
}
