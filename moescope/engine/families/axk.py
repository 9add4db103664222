"""A.X-K1 and A.X-K2: DeepSeek-V3 with a norm after the experts, or with gated norms and attention.

Source: transformers `modeling_axk1.py` and `modeling_axk2.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec, Layer
from moescope.engine.families import biased, common, latent
from moescope.engine.families.biased import Usual
from moescope.engine.families.deepseek import INDEX_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.latent import Ranks
from moescope.engine.families.names import PRE_NORM_NAMES, Constant, Names
from moescope.engine.operators import Norm


def axk1(config: Fields) -> DecoderSpec:
    ranks = _with_latent(config, latent.read_ranks(config, Ranks()))
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=32768)
    mixer = latent.attention(config, sizes, ranks, latent.read_rope(config, sizes, ranks))
    moe = biased.read_moe(
        config, sizes, biased.read_router(config, Usual(scale=2.5, groups=(8, 4), chosen=8))
    )
    dense, norm = biased.read_dense(config, sizes), Norm(sizes.hidden, sizes.eps)
    plain = common.pre_norm_layer(sizes, mixer, dense)
    attention, mlp = common.pre_norm_layer(sizes, mixer, moe).branches
    normed = Layer((attention, replace(mlp, post_norm=norm)))
    sparse = _sparse(config, sizes.layers)
    return common.decoder(sizes, [normed if wanted else plain for wanted in sparse])


def axk2(config: Fields) -> DecoderSpec:
    """Queries see their latent normed and as it was, and bring a gate for the values; norms before
    attention and experts are gated. Masked groups get 0.0, on purpose."""
    ranks = _with_latent(config, latent.read_ranks(config, Ranks(384, 128, 64, 32, 64)))
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=131072)
    rope = latent.read_rope(config, sizes, ranks, interleaved=True)
    indexer = latent.read_indexer(config, replace(rope, style="half"), heads=16)
    mixer = latent.attention(config, sizes, ranks, rope, indexer=indexer, gate="in_q_proj")
    router = biased.read_router(config, Usual(scale=2.5, chosen=8))
    moe = biased.read_moe(config, sizes, router.with_policy(group_mask_fill="0"))
    dense, norm = biased.read_dense(config, sizes), Norm(sizes.hidden, sizes.eps)
    gated = replace(norm, gate_rank=config.int("gated_norm_rank", 1, common.SIZE, 16))
    layers = []
    for wanted in _sparse(config, sizes.layers):
        attention, mlp = common.pre_norm_layer(sizes, mixer, moe if wanted else dense).branches
        feed_forward = replace(mlp, pre_norm=gated if wanted else norm)
        layers.append(Layer((replace(attention, pre_norm=gated), feed_forward)))
    return common.decoder(sizes, layers)


def _with_latent(config: Fields, ranks: Ranks) -> Ranks:
    if not ranks.q:
        raise config.error("q_lora_rank", "a positive integer")
    return ranks


def _sparse(config: Fields, layers: int) -> list[bool]:
    return biased.typed_layers(config, layers, biased.every_so_many(config, layers, 1))


_K1: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.mlp.post_norm": ("..post_mlp_layernorm", ".post_mlp_layernorm"),
    # as released, without one
    "layers.{n}.mlp.gate.correction_bias": (".e_score_correction_bias", Constant(0.0)),
    "unread": ("*.post_mlp_layernorm.weight",),  # of dense layers
}
_GATED = {"weight": (".norm.weight", ".weight")} | {
    f"gate_{letter}": (f".W_{way}", f".mlp.fc{number}")
    for letter, way, number in (("a", "down", 1), ("b", "up", 2))
}
_K2: Names = {
    **PRE_NORM_NAMES,
    **{
        f"layers.{{n}}.{branch}.pre_norm.{leaf}": places
        for branch in ("attention", "mlp")
        for leaf, places in _GATED.items()
    },
    "layers.{n}.attention.q_b_proj": (".q_b_proj", ".q_gate_proj"),
}
_ROUTED = "sigmoid, biased choice within groups, renormalised and scaled"
_KEYS = {"num_experts": "n_routed_experts"}
FAMILIES = {
    "axk1": Family("A.X-K1", axk1, _K1, _ROUTED, _KEYS),
    "axk2": Family("A.X-K2", axk2, _K2, _ROUTED, _KEYS, notes=(INDEX_NOTE,)),
}
