"""Ling and Ring 1.x and 2.x (Bailing-MoE): one projection for queries, keys and values, softmax or
biased sigmoid routing, and in the first of them a head whose columns are normalised.

Sources: arXiv 2503.05139; mlx-lm `bailing_moe.py`. transformers has no class for them.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.deepseek import MASK_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, MoE
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring


def bailing_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=32768)
    bias = config.bool("use_bias", False)
    share = config.int("rotary_dim", 2, sizes.head_dim, sizes.head_dim) / sizes.head_dim
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context, partial=share)
    mixer = common.attention(
        sizes,
        rope,
        qkv_bias=config.bool("use_qkv_bias", False),
        out_bias=bias,
        qk_norm="per_head" if config.bool("use_qk_norm", False) else "none",
    )
    moe = _moe(config, sizes, bias)
    sparse = biased.first_dense(config, sizes.layers, 0)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes, bias=bias))
    spec = biased.decoder(sizes, [mixer] * sizes.layers, blocks)
    return replace(spec, norm_head=config.bool("norm_head", False))


def _moe(config: Fields, sizes: common.Sizes, bias: bool) -> MoE:
    """The shared experts have a width of their own, if the config gives one."""
    router = _router(config)
    width = config.int("moe_intermediate_size", 1, common.SIZE)
    each = config.int("moe_shared_expert_intermediate_size", 1, common.SIZE, width)
    activation, count = common.read_activation(config), router.wiring.shared_experts
    shared = MLP(sizes.hidden, each * count, activation, bias=bias) if count else None
    experts = replace(common.experts(config, width), bias=bias)
    return MoE(sizes.hidden, router, experts, shared)


def _router(config: Fields) -> RouterSpec:
    """The sigmoid ones multiply and weigh in float32, the softmax ones in the model's dtype."""
    sigmoid = config.str("score_function", ("softmax", "sigmoid"), "softmax") == "sigmoid"
    experts, chosen = biased.read_counts(config)
    groups, best = config.int("n_group", 1, common.COUNT, 1), 1
    if groups > 1:
        groups, best = biased.read_groups(config, experts, 1, 1)
    if not config.bool("moe_router_enable_routed_scaling", True):
        raise config.error("moe_router_enable_routed_scaling", "true")
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid" if sigmoid else "softmax",
        correction_bias="score" if config.bool("moe_router_enable_expert_bias", False) else "none",
        n_group=groups,
        topk_group=best,
        norm_topk_prob=config.bool("norm_topk_prob") and chosen > 1,
        norm_eps=1e-20,
        routed_scaling_factor=biased.read_scale(config, 1.0),
    )
    shared = biased.read_shared_count(config, 0)
    wiring = RouterWiring(
        experts,
        router_dtype="float32" if sigmoid else "model",
        shared_experts=shared if config.bool("moe_router_enable_shared_expert", True) else 0,
        combine_dtype="float32" if sigmoid else "model",
    )
    return RouterSpec(policy, wiring)


_NAMES: Names = {
    **PRE_NORM_NAMES,
    "embed": "model.word_embeddings",
    "layers.{n}.attention": ".attention",
    "layers.{n}.attention.qkv": ".query_key_value",
}
_CHECKED = "compared with mlx-lm, transformers having no class for it"
FAMILIES = {
    "bailing_moe": Family(
        "Ling and Ring",
        bailing_moe,
        _NAMES,
        "softmax, or sigmoid and biased choice within groups; renormalised",
        notes=(_CHECKED, MASK_NOTE),
    ),
}
