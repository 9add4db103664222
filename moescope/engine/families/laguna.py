"""Laguna: heads counted by layer, a softplus gate on what attention gives, ropes by type of layer,
capped router logits, and the experts' sum scaled after it is taken.

Source: transformers `modeling_laguna.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLP, Attention, MoE, Rope
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

# type of layer -> base and turned share of a head, where the config has no ropes at all
_ROPES = {FULL: (500000.0, 0.5), SLIDING: (10000.0, 1.0)}


def laguna(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=131072, kv_heads=8, head_dim=128)
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), [FULL] * sizes.layers)
    kinds = {kind: _attention(config, sizes, kind) for kind in sorted(set(types))}
    mixers = [
        replace(kinds[kind], heads=heads)
        for kind, heads in zip(types, _heads(config, sizes), strict=True)
    ]
    width = config.int("shared_expert_intermediate_size", 1, common.SIZE, 512)
    moe = MoE(
        sizes.hidden,
        _router(config),
        common.experts(config, config.int("moe_intermediate_size", 1, common.SIZE, 512)),
        MLP(sizes.hidden, width, common.read_activation(config)),
    )
    sparse = biased.typed_layers(config, sizes.layers, [n > 0 for n in range(sizes.layers)])
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, mixers, blocks)


def _attention(config: Fields, sizes: common.Sizes, kind: str) -> Attention:
    bias = config.bool("attention_bias", False)
    mixer = common.attention(
        sizes,
        _rope(config, sizes, kind),
        window=config.int("sliding_window", 1, ropes.FAR, 512) if kind == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
    )
    gating = config.raw("gating")
    if gating in (True, "per-head") or "gating" not in config.values:
        return replace(mixer, gate="softplus_per_head")
    if gating != "per-element":
        raise config.error("gating", "true, per-head or per-element")
    return replace(mixer, gate="softplus")


def _rope(config: Fields, sizes: common.Sizes, kind: str) -> Rope:
    if not config.has("rope_parameters"):
        theta, share = _ROPES[kind]
        return Rope(theta, int(sizes.head_dim * share))
    source = ropes.rope_of_type(config, kind)
    if source is None:
        raise config.error("rope_parameters", f"an object for {kind}")
    return ropes.read_rope(config, sizes.head_dim, sizes.context, source=source)


def _heads(config: Fields, sizes: common.Sizes) -> list[int]:
    name = "num_attention_heads_per_layer"
    heads: list[int] = config.list(name, int, sizes.layers, default=[sizes.heads] * sizes.layers)
    if any(not 1 <= count <= common.COUNT or count % sizes.kv_heads for count in heads):
        raise config.error(name, f"multiples of num_key_value_heads {sizes.kv_heads}")
    return heads


def _router(config: Fields) -> RouterSpec:
    config.str("moe_router_score_func", ("sigmoid",), default="sigmoid")
    if config.bool("moe_apply_router_weight_on_input", False):
        raise config.error("moe_apply_router_weight_on_input", "false")
    experts, chosen = biased.read_counts(config, 8)
    policy = RouterPolicy(
        chosen,
        router_logit_softcapping=config.float("moe_router_logit_softcapping", 0.0, 1e6, 0.0),
        scoring_func="sigmoid",
        correction_bias="score",
        norm_topk_prob=True,
        routed_scaling_factor=config.float("moe_routed_scaling_factor", 0.0, 1e6, 1.0),
        scale_site="routed_output",
    )
    return RouterSpec(policy, RouterWiring(experts, shared_experts=1))


_SITE = (
    "moe_routed_scaling_factor is on the experts' sum, as in transformers; mlx-lm has it in the "
    "weights, so weights recorded there differ by the factor"
)
FAMILIES = {
    "laguna": Family(
        "Laguna",
        laguna,
        PRE_NORM_NAMES,
        "capped sigmoid, biased choice, renormalised; the sum scaled",
        notes=(_SITE,),
    ),
}
