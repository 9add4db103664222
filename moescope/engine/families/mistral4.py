"""Mistral 4: latent attention whose queries grow warmer with their position, softmax in groups.

Source: transformers `modeling_mistral4.py`. Router and scores are in the model's dtype.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, latent, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.latent import Ranks
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLA, Rope
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

CONTEXT = 1048576


def mistral4(config: Fields) -> DecoderSpec:
    ranks = latent.read_ranks(config, Ranks(q=1024, kv=256, nope=64))
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=CONTEXT, head_dim=ranks.width)
    mixer = latent.attention(config, sizes, ranks, _rope(config, sizes, ranks))
    mixer = _warmed(config, mixer)
    moe = biased.read_moe(config, sizes, _router(config))
    sparse = biased.first_dense(config, sizes.layers, 0)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, [mixer] * sizes.layers, blocks)


def _rope(config: Fields, sizes: common.Sizes, ranks: Ranks) -> Rope:
    """The moving part is a share of the whole head, by `partial_rotary_factor`."""
    if not config.has(("rope_parameters", "rope_scaling")):
        raise config.error("rope_parameters", "yarn with llama_4_scaling_beta")
    rope = ropes.read_rope(
        config,
        ranks.width,
        sizes.context,
        partial=ranks.rope / ranks.width,
        style="interleaved" if config.bool("rope_interleave", True) else "half",
    )
    if rope.dims != ranks.rope:
        raise config.error("partial_rotary_factor", f"{ranks.rope} of {ranks.width} dims")
    return rope


def _warmed(config: Fields, mixer: MLA) -> MLA:
    source = config.fields(("rope_parameters", "rope_scaling"))
    assert source is not None
    beta = source.float("llama_4_scaling_beta", 0.0, 1e3)
    floor = source.int("original_max_position_embeddings", 1, ropes.FAR)
    return replace(mixer, temperature_scale=beta, temperature_floor=floor if beta else 0)


def _router(config: Fields) -> RouterSpec:
    experts, chosen = biased.read_counts(config, 4)
    groups, best = biased.read_groups(config, experts, 1, 1)
    policy = RouterPolicy(
        chosen,
        score_dtype="model",
        n_group=groups,
        topk_group=best,
        group_mask_fill="0",
        norm_topk_prob=config.bool("norm_topk_prob", True),
        norm_eps=1e-20,
        routed_scaling_factor=biased.read_scale(config, 1.0),
    )
    return RouterSpec(
        policy, RouterWiring(experts, shared_experts=biased.read_shared_count(config, 1))
    )


_SCORES = (
    "scores are in the model's dtype, as in transformers; mlx-lm scores in float32, so in bfloat16 "
    "near ties may fall otherwise"
)
_KEYS = {"num_experts": "n_routed_experts"}
FAMILIES = {
    "mistral4": Family(
        "Mistral 4", mistral4, PRE_NORM_NAMES, "renormalised softmax", _KEYS, notes=(_SCORES,)
    ),
}
