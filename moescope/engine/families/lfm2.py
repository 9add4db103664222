"""LFM2-MoE: gated short convolutions with an attention layer now and then.

Source: transformers `modeling_lfm2_moe.py`. The router scores in the model's dtype, and its eps is
1e-6 where relatives have 1e-20.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, MoE, Norm, ShortConv
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

CONV, FULL = "conv", "full_attention"

NAMES: Names = {
    **PRE_NORM_NAMES,
    "final_norm": "model.embedding_norm",
    "layers.{n}.attention.pre_norm": "..operator_norm",
    "layers.{n}.conv": ".conv",
    "layers.{n}.conv.pre_norm": "..operator_norm",
    "layers.{n}.mlp": ".feed_forward",
    "layers.{n}.mlp.pre_norm": "..ffn_norm",
}


def lfm2_moe(config: Fields) -> DecoderSpec:
    tied = config.bool("tie_embedding", True)
    sizes = common.read_sizes(
        config, eps=1e-5, context=128000, kv_heads=8, width=7168, eps_key="norm_eps", tied=tied
    )
    rope = common.read_rope(config, sizes, usual_theta=1e6)
    norm = Norm(sizes.hidden, sizes.eps)
    mixers = {
        FULL: Branch("attention", common.attention(sizes, rope, qk_norm="per_head"), norm),
        CONV: Branch("conv", _conv(config, sizes), norm),
    }
    width = config.int("moe_intermediate_size", 1, common.SIZE, 1792)
    moe = MoE(sizes.hidden, _router(config), common.experts(config, width))
    dense = MLP(sizes.hidden, sizes.width, common.read_activation(config))
    first = config.int("num_dense_layers", 0, 1024, 2)
    types = config.list("layer_types", str, sizes.layers)
    if unknown := set(types) - set(mixers):
        raise config.error("layer_types", f"{CONV} or {FULL}, not {sorted(unknown)[0]}")
    layers = [
        Layer((mixers[kind], Branch("mlp", dense if number < first else moe, norm)))
        for number, kind in enumerate(types)
    ]
    return common.decoder(sizes, layers)


def _conv(config: Fields, sizes: common.Sizes) -> ShortConv:
    kernel = config.int("conv_L_cache", 2, 64, 3)
    return ShortConv(sizes.hidden, kernel, config.bool("conv_bias", False))


def _router(config: Fields) -> RouterSpec:
    experts, chosen = biased.read_counts(config)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        score_dtype="model",
        correction_bias="score" if config.bool("use_expert_bias", True) else "none",
        norm_topk_prob=config.bool("norm_topk_prob", True),
        norm_eps=1e-6,
        routed_scaling_factor=config.float("routed_scaling_factor", 0.0, 1e6, 1.0),
    )
    return RouterSpec(policy, RouterWiring(experts))


FAMILIES = {
    "lfm2_moe": Family("LFM2-MoE", lfm2_moe, NAMES, "renormalised sigmoid, biased choice"),
}
