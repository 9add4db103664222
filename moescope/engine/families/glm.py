"""GLM-4.5 to GLM-5: DeepSeek-V3's router over grouped or latent attention.

Sources: arXiv 2508.06471; transformers `modeling_glm4_moe.py`, `_glm4_moe_lite.py`,
`_glm_moe_dsa.py`. Solar Open is GLM-4.5 without dense layers and with whole heads turned.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, latent, ropes
from moescope.engine.families.biased import Usual
from moescope.engine.families.deepseek import INDEX_NOTE, MASK_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.latent import Ranks
from moescope.engine.families.names import PRE_NORM_NAMES


def glm4_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8)
    mixer = common.attention(
        sizes,
        ropes.read_rope(config, sizes.head_dim, sizes.context, partial=0.5),
        qkv_bias=config.bool("attention_bias", False),
        qk_norm="per_head" if config.bool("use_qk_norm", False) else "none",
    )
    moe = biased.read_moe(config, sizes, biased.read_router(config, Usual(chosen=8)))
    sparse = biased.first_dense(config, sizes.layers, 1)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def solar_open(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8, head_dim=128, width=0)
    mixer = common.attention(
        sizes,
        ropes.read_rope(config, sizes.head_dim, sizes.context, usual_theta=1e6),
        qkv_bias=config.bool("attention_bias", False),
    )
    moe = biased.read_moe(config, sizes, biased.read_router(config, Usual(chosen=8)))
    return biased.decoder(sizes, [mixer] * sizes.layers, [moe] * sizes.layers)


def glm4_moe_lite(config: Fields) -> DecoderSpec:
    ranks = latent.read_ranks(config, Ranks(q=768, nope=192, v=256))
    sizes = latent.read_sizes(config, ranks, eps=1e-5, context=202752)
    mixer = latent.attention(config, sizes, ranks, latent.read_rope(config, sizes, ranks))
    moe = biased.read_moe(config, sizes, biased.read_router(config, Usual(scale=1.8, chosen=4)))
    sparse = biased.typed_layers(config, sizes.layers, 1)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def glm_moe_dsa(config: Fields) -> DecoderSpec:
    """Indexers turn neighbouring dims, and layers may see what the last indexer chose."""
    ranks = latent.read_ranks(config, Ranks(q=2048, nope=192, v=256))
    sizes = latent.read_sizes(config, ranks, eps=1e-5, context=202752)
    rope = latent.read_rope(config, sizes, ranks, interleaved=True)
    indexer = latent.read_indexer(config, rope, heads=32)
    own = latent.attention(config, sizes, ranks, rope, indexer=indexer)
    shared = replace(own, indexer=None, shares_choice=True)
    mixers = [own if full else shared for full in _indexed(config, sizes.layers)]
    moe = biased.read_moe(config, sizes, biased.read_router(config, Usual(scale=2.5, chosen=8)))
    sparse = biased.typed_layers(config, sizes.layers, 3)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, mixers, blocks)


_FULL, _SHARED = "full", "shared"
_LETTERS = {"F": _FULL, "S": _SHARED}


def _indexed(config: Fields, layers: int) -> list[bool]:
    """Which layers have an indexer of their own: by `indexer_types`, by a pattern (a word of F and
    S, or a list), or every so many layers."""
    names = ("indexer_types", "index_topk_pattern")
    name = next((name for name in names if config.has(name)), "")
    if not name:
        every = config.int("index_topk_freq", 0, 1024, 1) or 1
        offset = config.int("index_skip_topk_offset", 0, 1024, 2)
        return [max(number - offset + 1, 0) % every == 0 for number in range(layers)]
    given = config.raw(name)
    if isinstance(given, str):
        types = [_LETTERS.get(letter, letter) for letter in given]
    else:
        types = config.list(name, str)
    if len(types) < layers or set(types) - {_FULL, _SHARED}:
        raise config.error(name, f"{_FULL} or {_SHARED} for each of {layers} layers")
    if types[0] == _SHARED:
        raise config.error(name, f"{_FULL} for the first layer, which has none before it")
    return [kind == _FULL for kind in types[:layers]]


_ROUTED = "sigmoid, biased choice, renormalised and scaled"
_KEYS = {"num_experts": "n_routed_experts"}
FAMILIES = {
    "glm4_moe": Family("GLM-4.5", glm4_moe, PRE_NORM_NAMES, _ROUTED, _KEYS, notes=(MASK_NOTE,)),
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash", glm4_moe_lite, PRE_NORM_NAMES, _ROUTED, _KEYS, notes=(MASK_NOTE,)
    ),
    "glm_moe_dsa": Family(
        "GLM-5", glm_moe_dsa, PRE_NORM_NAMES, _ROUTED, _KEYS, notes=(MASK_NOTE, INDEX_NOTE)
    ),
    "solar_open": Family(
        "Solar Open", solar_open, PRE_NORM_NAMES, _ROUTED, _KEYS, notes=(MASK_NOTE,)
    ),
}
