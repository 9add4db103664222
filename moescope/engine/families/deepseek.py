"""DeepSeek V1 to V3.2 and Kimi K2: latent attention, and the router that was copied most.

Sources: arXiv 2401.06066, 2405.04434 and 2412.19437; mlx-lm `deepseek.py`; transformers
`modeling_deepseek_v2.py`, `_v3.py`, `_v32.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, latent
from moescope.engine.families.biased import Usual
from moescope.engine.families.family import Family, NoteIf
from moescope.engine.families.latent import Ranks
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring


def deepseek(config: Fields) -> DecoderSpec:
    """V1: grouped attention and a plain softmax router, renormalised where the config says so."""
    sizes = common.read_sizes(config, eps=1e-6, context=2048)
    bias = config.bool("attention_bias", False)
    rope = common.read_rope(config, sizes)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias)
    config.str("scoring_func", ("softmax",), default="softmax")
    experts, chosen = biased.read_counts(config)
    router = RouterSpec(
        RouterPolicy(
            chosen,
            norm_topk_prob=config.bool("norm_topk_prob", False) and chosen > 1,
            norm_eps=1e-20,
        ),
        RouterWiring(experts, shared_experts=biased.read_shared_count(config, 0)),
    )
    moe, dense = biased.read_moe(config, sizes, router), biased.read_dense(config, sizes)
    sparse = biased.every_so_many(config, sizes.layers, 0)
    return biased.decoder(sizes, [mixer] * sizes.layers, biased.blocks(sparse, moe, dense))


def deepseek_v2(config: Fields) -> DecoderSpec:
    """Rotations are float32 (complex products); groups are scored by their best expert."""
    ranks = latent.read_ranks(config, Ranks())
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=2048)
    rope = latent.read_rope(config, sizes, ranks, applies="float32", interleaved=True)
    mixer = latent.attention(config, sizes, ranks, rope)
    bias = config.bool("mlp_bias", False)
    moe = biased.read_moe(config, sizes, _v2_router(config), bias=bias)
    dense = biased.read_dense(config, sizes, bias=bias)
    blocks = biased.blocks(biased.first_dense(config, sizes.layers, 0), moe, dense)
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def _v2_router(config: Fields) -> RouterSpec:
    config.str("scoring_func", ("softmax",), default="softmax")
    method = config.str("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    experts, chosen = biased.read_counts(config)
    policy = RouterPolicy(chosen, routed_scaling_factor=biased.read_scale(config, 1.0))
    if method == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            config.int(name, 1, experts)  # there is no usual
        groups, best = biased.read_groups(config, experts, 1, 1)
        policy = replace(
            policy, n_group=groups, topk_group=best, group_score="max", group_mask_fill="0"
        )
    wiring = RouterWiring(
        experts,
        router_dtype="float32",
        shared_experts=biased.read_shared_count(config, 2),
        combine_dtype="float32",
    )
    return RouterSpec(policy, wiring)


def deepseek_v3(config: Fields) -> DecoderSpec:
    ranks = latent.read_ranks(config, Ranks())
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=4096)
    mixer = latent.attention(config, sizes, ranks, latent.read_rope(config, sizes, ranks))
    moe = biased.read_moe(config, sizes, biased.read_router(config, _V3))
    sparse = biased.first_dense(config, sizes.layers, 3)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def deepseek_v32(config: Fields) -> DecoderSpec:
    """V3 with an indexer in every layer, whose rope turns halves."""
    ranks = latent.read_ranks(config, Ranks())
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=163840)
    rope = latent.read_rope(config, sizes, ranks, interleaved=True)
    indexer = latent.read_indexer(config, replace(rope, style="half"), heads=64)
    mixer = latent.attention(config, sizes, ranks, rope, indexer=indexer)
    moe = biased.read_moe(config, sizes, biased.read_router(config, _V3))
    sparse = biased.typed_layers(config, sizes.layers, 3)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


_V3 = Usual(scale=2.5, groups=(8, 4), chosen=8)


def _grouped(config: Fields) -> bool:
    return config.raw("n_group") not in (1, config.raw("topk_group"))


def _renormalised(config: Fields) -> bool:
    return config.raw("norm_topk_prob") is True


MASK_NOTE = NoteIf(
    "where groups limit the choice, mlx-lm (0.32) gives masked experts the score 0.0, so that they "
    "beat admissible ones with a negative biased score; transformers, and moescope, -inf",
    _grouped,
)
_IGNORED = NoteIf(
    "norm_topk_prob is ignored, as by transformers and mlx-lm; the code first published with "
    "DeepSeek-V2 renormalises instead of scaling where it is true",
    _renormalised,
)
INDEX_NOTE = (
    "the indexer scores in the model's dtype, as transformers does; DeepSeek's own kernels score "
    "rotated keys in FP8, so near ties they may see other tokens"
)
_V3_ROUTED = "sigmoid, biased choice within groups, renormalised and scaled"
_FIRST = (
    "compared with mlx-lm, transformers having no class for it",
    NoteIf(
        "mlx-lm ignores norm_topk_prob and never renormalises; moescope does where it is true, as "
        "the code published with the model",
        _renormalised,
    ),
)
_KEYS = {"num_experts": "n_routed_experts"}
FAMILIES = {
    "deepseek": Family(
        "DeepSeek-MoE", deepseek, PRE_NORM_NAMES, "not renormalised", _KEYS, notes=_FIRST
    ),
    "deepseek_v2": Family(
        "DeepSeek-V2", deepseek_v2, PRE_NORM_NAMES, "not renormalised", _KEYS, notes=(_IGNORED,)
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3", deepseek_v3, PRE_NORM_NAMES, _V3_ROUTED, _KEYS, notes=(MASK_NOTE,)
    ),
    "kimi_k2": Family(
        "Kimi-K2", deepseek_v3, PRE_NORM_NAMES, _V3_ROUTED, _KEYS, notes=(MASK_NOTE,)
    ),
    "deepseek_v32": Family(
        "DeepSeek-V3.2",
        deepseek_v32,
        PRE_NORM_NAMES,
        _V3_ROUTED,
        _KEYS,
        notes=(MASK_NOTE, INDEX_NOTE),
    ),
}
