"""Mellum 2: Qwen3-MoE's router and norms, with a rope for each type of layer.

Source: transformers `modeling_mellum.py`.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLP, MoE

DENSE, SPARSE = "dense", "sparse"


def mellum(config: Fields) -> DecoderSpec:
    """Lists say of every layer what it attends to, and whether it routes."""
    sizes = common.read_sizes(config, eps=1e-6, context=131072, kv_heads=4, head_dim=128)
    every = sizes.layers
    attends = common.read_layer_types(config, every, (FULL, SLIDING), [FULL] * every)
    feeds = common.read_layer_types(
        config, every, (DENSE, SPARSE), [SPARSE] * every, "mlp_layer_types"
    )
    windows = {FULL: 0, SLIDING: config.int("sliding_window", 1, 1 << 30, 1024)}
    bias = config.bool("attention_bias", False)
    mixers = {}
    for kind in dict.fromkeys(attends):
        source = ropes.rope_of_type(config, kind)
        if source is None:
            raise config.error("rope_parameters", f"an object with {kind}")
        mixers[kind] = common.attention(
            sizes,
            ropes.read_rope(config, sizes.head_dim, sizes.context, source=source),
            window=windows[kind],
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="per_head",
        )
    width = config.int("moe_intermediate_size", 1, common.SIZE, 896)
    router = common.softmax_router(config, usual_norm=True)
    blocks: dict[str, MoE | MLP] = {
        SPARSE: MoE(sizes.hidden, router, common.experts(config, width)),
        DENSE: MLP(sizes.hidden, sizes.width, common.read_activation(config)),
    }
    pairs = zip(attends, feeds, strict=True)
    layers = [common.pre_norm_layer(sizes, mixers[kind], blocks[feed]) for kind, feed in pairs]
    return common.decoder(sizes, layers)


FAMILIES = {"mellum": Family("Mellum 2", mellum, PRE_NORM_NAMES, "renormalised")}
