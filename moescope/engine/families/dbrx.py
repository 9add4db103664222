"""DBRX: scores in the model's dtype, weights divided by a p-norm, LayerNorm without bias, and one
tensor for q, k and v.

Source: transformers `modeling_dbrx.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.common import COUNT, SIZE, Sizes
from moescope.engine.families.family import Family
from moescope.engine.families.names import Names
from moescope.engine.operators import Attention, Experts, MoE, Norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

NAMES: Names = {
    "embed": "transformer.wte",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
    "layers.{n}": "transformer.blocks.{n}",
    "layers.{n}.attention": ".norm_attn_norm.attn",
    "layers.{n}.attention.pre_norm": "..norm_attn_norm.norm_1",
    "layers.{n}.attention.qkv": ".Wqkv",
    "layers.{n}.mlp": ".ffn",
    "layers.{n}.mlp.pre_norm": "..norm_attn_norm.norm_2",
}
_HEADS = ("n_heads", "num_attention_heads")


def dbrx(config: Fields) -> DecoderSpec:
    attends, feeds = (
        config.fields(key) or Fields({}, prefix=f"{key}.") for key in ("attn_config", "ffn_config")
    )
    sizes = _sizes(config, attends, feeds)
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context)
    theta = attends.float("rope_theta", 1.0, 1e15, default=rope.theta)
    mixer = Attention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        replace(rope, theta=theta),
        clip_qkv=attends.float("clip_qkv", 0.0, default=None),
    )
    moe = MoE(sizes.hidden, _router(feeds), Experts(sizes.width, _activation(feeds)))
    norm = Norm(sizes.hidden, 1e-5, "layer")
    layer = common.pre_norm_layer(sizes, mixer, moe, norm=norm)
    return common.decoder(sizes, [layer] * sizes.layers, final_norm=norm)


def _sizes(config: Fields, attends: Fields, feeds: Fields) -> Sizes:
    heads = config.int(_HEADS, 1, COUNT, 16)
    hidden = config.int(("d_model", "hidden_size"), 1, SIZE, 2048)
    kv_heads = attends.int("kv_n_heads", 1, COUNT, 1)
    if hidden % (2 * heads):
        raise config.error(_HEADS, f"heads of an even width in {hidden}")
    if heads % kv_heads:
        raise attends.error("kv_n_heads", f"a divisor of n_heads {heads}")
    return Sizes(
        vocab=config.int("vocab_size", 1, 1 << 24),
        hidden=hidden,
        width=feeds.int("ffn_hidden_size", 1, SIZE, 3584),
        layers=config.int(("n_layers", "num_hidden_layers"), 1, 1024, 24),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        context=config.int(("max_seq_len", "max_position_embeddings"), 1, 1 << 30, 2048),
        eps=1e-5,
        tied=config.bool("tie_word_embeddings", False),
    )


def _router(feeds: Fields) -> RouterSpec:
    """Weights are divided by their norm, unless `moe_normalize_expert_weights` is null."""
    experts = feeds.int("moe_num_experts", 1, COUNT, 4)
    chosen = feeds.int("moe_top_k", 1, min(64, experts), 1)
    power = feeds.float("moe_normalize_expert_weights", 1e-3, 1e3, default=None)
    if power is None and "moe_normalize_expert_weights" not in feeds.values:
        power = 1.0
    policy = RouterPolicy(
        chosen,
        logits_dtype="model",
        score_dtype="model",
        norm_topk_prob=power is not None,
        norm_p=power or 1.0,
    )
    return RouterSpec(policy, RouterWiring(experts))


def _activation(feeds: Fields) -> Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"]:
    function = feeds.fields("ffn_act_fn") or Fields({})
    return common.read_activation(function, "name")


FAMILIES = {
    "dbrx": Family(
        "DBRX",
        dbrx,
        NAMES,
        "renormalised",
        {"moe_intermediate_size": "ffn_hidden_size", "num_experts": "moe_num_experts"},
        notes=(
            "transformers (5.23) ignores the rope_theta of attn_config and takes 10000; "
            "moescope takes what the config says",
            "scores are in the model's dtype, as in transformers; mlx-lm scores in float32, so in "
            "bfloat16 near ties may fall otherwise",
        ),
    ),
}
