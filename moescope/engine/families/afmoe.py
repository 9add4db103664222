"""AFMoE (Trinity): gated attention with positions in windows only, norms on both sides of every
block, sigmoid routing with a bias.

Source: transformers `modeling_afmoe.py`, which ignores score_func, route_norm and n_group where
mlx-lm does not; other values than the released ones are refused.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import Norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring


def afmoe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=16384, head_dim=128)
    bias = config.bool("attention_bias", False)
    sliding = common.attention(
        sizes,
        common.read_rope(config, sizes),
        window=config.int("sliding_window", 1, ropes.FAR, 1024),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
        norm_applies="float32",
    )
    every = config.int("global_attn_every_n_layers", 1, 1024, 4)
    usual = [SLIDING if (n + 1) % every else FULL for n in range(sizes.layers)]
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    mixers = biased.placed_in_windows(replace(sliding, gate="sigmoid"), types)
    moe = biased.read_moe(config, sizes, _router(config))
    first = config.int("num_dense_layers", 0, 1024, 1)
    sparse = [number >= first for number in range(sizes.layers)]
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    layers = [
        Layer((Branch("attention", mixer, norm, norm), Branch("mlp", block, norm, norm)))
        for mixer, block in zip(mixers, blocks, strict=True)
    ]
    spec = common.decoder(sizes, layers, applies="float32")
    scale = sizes.hidden**0.5 if config.bool("mup_enabled", False) else 1.0
    return replace(spec, embedding_scale=scale)


def _router(config: Fields) -> RouterSpec:
    config.str("score_func", ("sigmoid",), default="sigmoid")
    if not config.bool("route_norm", True):
        raise config.error("route_norm", "true")
    for name in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        if config.int(name, 0, common.COUNT, 1) > 1:
            raise config.error(name, "1")
    experts, chosen = biased.read_counts(config, 6)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        correction_bias="score",
        norm_topk_prob=True,
        norm_eps=1e-20,
        routed_scaling_factor=config.float("route_scale", 0.0, 1e6, 1.0),
    )
    wiring = RouterWiring(
        experts, shared_experts=biased.read_shared_count(config, 2), combine_dtype="float32"
    )
    return RouterSpec(policy, wiring)


_NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention.post_norm": "..post_attention_layernorm",
    "layers.{n}.mlp.pre_norm": "..pre_mlp_layernorm",
    "layers.{n}.mlp.post_norm": "..post_mlp_layernorm",
}
FAMILIES = {
    "afmoe": Family("AFMoE", afmoe, _NAMES, "sigmoid, biased choice, renormalised and scaled"),
}
