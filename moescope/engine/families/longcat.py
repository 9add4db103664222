"""LongCat-Flash: two latent attentions and two dense blocks a layer, experts on a shortcut past the
second pair, and experts that give back what they are given.

Sources: arXiv 2509.01322; transformers `modeling_longcat_flash.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, latent, ropes
from moescope.engine.families.biased import EXPERTS, read_scale
from moescope.engine.families.family import Family
from moescope.engine.families.latent import Ranks
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Experts, MoE, Norm, Pass
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

DENSE = ("ffn_hidden_size", "intermediate_size")
WIDTH = ("expert_ffn_hidden_size", "moe_intermediate_size")
CHOSEN = ("moe_topk", "num_experts_per_tok")


def longcat_flash(config: Fields) -> DecoderSpec:
    ranks = latent.read_ranks(config, Ranks())
    sizes = _sizes(config)
    rope = latent.read_rope(config, sizes, ranks, usual_theta=1e7, interleaved=True)
    for name in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        if not config.bool(name, True):
            raise config.error(name, "true")
    mixer = replace(
        latent.attention(config, sizes, ranks, rope),
        q_latent_scale=(sizes.hidden / ranks.q) ** 0.5,
        kv_latent_scale=(sizes.hidden / ranks.kv) ** 0.5,
    )
    activation = common.read_activation(config)
    moe = MoE(
        sizes.hidden,
        _router(config),
        Experts(config.int(WIDTH, 1, common.SIZE, 2048), activation),
    )
    norm, mlp = Norm(sizes.hidden, sizes.eps), MLP(sizes.hidden, sizes.width, activation)
    layer = Layer(
        (
            Branch("attention_0", mixer, norm),
            Branch("normed", Pass(), norm, adds_to="normed"),
            Branch("moe", moe, reads="normed", adds_to="shortcut"),
            Branch("mlp_0", mlp, reads="normed"),
            Branch("attention_1", mixer, norm),
            Branch("mlp_1", mlp, norm),
            Branch("join", Pass(), reads="shortcut"),
        )
    )
    return common.decoder(sizes, [layer] * sizes.layers)


def _sizes(config: Fields) -> common.Sizes:
    """`num_layers` counts pairs; transformers writes their halves as `num_hidden_layers` too."""
    heads = config.int("num_attention_heads", 1, common.COUNT)
    if config.int("num_key_value_heads", 1, common.COUNT, heads) != heads:
        raise config.error("num_key_value_heads", f"num_attention_heads, {heads}")
    return common.Sizes(
        vocab=config.int("vocab_size", 1, 1 << 24),
        hidden=config.int("hidden_size", 1, common.SIZE),
        width=config.int(DENSE, 1, common.SIZE),
        layers=config.int("num_layers", 1, 1024),
        heads=heads,
        kv_heads=heads,
        head_dim=config.int("qk_rope_head_dim", 2, common.SIZE, 64),
        context=config.int("max_position_embeddings", 1, ropes.FAR, 131072),
        eps=config.float("rms_norm_eps", 0.0, 1.0, default=1e-5),
        tied=config.bool("tie_word_embeddings", False),
    )


def _router(config: Fields) -> RouterSpec:
    """Softmax over real experts and those that compute nothing, chosen by score + bias; weights are
    scaled and not renormalised, also those of what is given back."""
    for name in ("router_bias", "norm_topk_prob"):
        if config.bool(name, False):
            raise config.error(name, "false")
    config.str("zero_expert_type", ("identity",), default="identity")
    null = config.int("zero_expert_num", 0, common.COUNT, 256)
    policy = RouterPolicy(
        config.int(CHOSEN, 1, 64, 12),
        correction_bias="score",
        routed_scaling_factor=read_scale(config, 6.0),
    )
    wiring = RouterWiring(
        config.int(EXPERTS, 1, common.COUNT),
        null,
        "identity" if null else "none",
        router_dtype="float32",
        combine_dtype="float32",
    )
    return RouterSpec(policy, wiring)


_NAMES: Names = {
    **PRE_NORM_NAMES,
    **{f"layers.{{n}}.attention_{i}": f".self_attn.{i}" for i in range(2)},
    **{f"layers.{{n}}.attention_{i}.pre_norm": f"..input_layernorm.{i}" for i in range(2)},
    **{f"layers.{{n}}.mlp_{i}": f".mlps.{i}" for i in range(2)},
    "layers.{n}.normed.pre_norm": "..post_attention_layernorm.0",
    "layers.{n}.mlp_1.pre_norm": "..post_attention_layernorm.1",
    "layers.{n}.moe": ".mlp",
    "layers.{n}.moe.gate.correction_bias": "..router.e_score_correction_bias",
}
FAMILIES = {
    "longcat_flash": Family(
        "LongCat-Flash",
        longcat_flash,
        _NAMES,
        "softmax, biased choice, not renormalised, scaled",
        {
            "intermediate_size": "ffn_hidden_size",
            "moe_intermediate_size": "expert_ffn_hidden_size",
            "num_experts": "n_routed_experts",
        },
    ),
}
