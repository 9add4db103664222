"""JetMoE: attention is routed too. Both routers of a layer score the logits they chose.

Source: arXiv 2404.07413; transformers `modeling_jetmoe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, ropes
from moescope.engine.families.common import COUNT, SIZE, Sizes
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import Experts, MoE, Norm, RoutedAttention

NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention": ".self_attention",
    "layers.{n}.attention.gate": (".experts.router.layer", ".experts.router"),
    "layers.{n}.attention.output_bias": ".experts.bias",
    "layers.{n}.mlp.output_bias": ".bias",
}


def jetmoe(config: Fields) -> DecoderSpec:
    """Norms within layers have an eps of their own, whatever the config says."""
    sizes = _sizes(config)
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context)
    router = common.softmax_router(config, renormalises=False)
    router = router.with_policy(score_order="topk_then_score")
    mixer = RoutedAttention(
        sizes.hidden,
        router,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        rope,
        output_bias=True,
    )
    experts = Experts(sizes.width, common.read_activation(config, "activation_function"))
    moe = MoE(sizes.hidden, router, experts, output_bias=True)
    norm = Norm(sizes.hidden, 1e-6)
    layer = Layer((Branch("attention", mixer, norm), Branch("mlp", moe, norm)))
    return common.decoder(sizes, [layer] * sizes.layers)


def _sizes(config: Fields) -> Sizes:
    """Query heads are as many as key heads and experts chosen together make."""
    kv_heads = config.int("num_key_value_heads", 1, COUNT, 16)
    head_dim = config.int(("kv_channels", "head_dim"), 2, SIZE, 128)
    chosen = config.int("num_experts_per_tok", 1, 64, 2)
    known = {**config.values, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    known["num_attention_heads"] = kv_heads * chosen
    sizes = common.read_sizes(replace(config, values=known), eps=1e-6, context=4096)
    return replace(sizes, tied=config.bool("tie_word_embeddings", True))


FAMILIES = {
    "jetmoe": Family(
        "JetMoE",
        jetmoe,
        NAMES,
        "softmax over the chosen, of attention too",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"},
    ),
}
