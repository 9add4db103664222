"""Llama 4, the text tower: sigmoid of the chosen logit, which multiplies what the expert reads;
attention within chunks, and layers without rope whose queries warm up with their position.

Source: transformers `modeling_llama4.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.common import FULL
from moescope.engine.families.family import Family
from moescope.engine.families.layouts import MLX_BARE, TRANSPOSED
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLP, Attention, MoE, Norm, Rope

CHUNKED = "chunked_attention"


def llama4(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8, head_dim=128)
    rope = ropes.read_rope(
        config,
        sizes.head_dim,
        sizes.context,
        usual_theta=500000.0,
        applies="float32",
        style="interleaved",
    )
    turned = _turned(config, sizes.layers)
    usual = [CHUNKED if turns else FULL for turns in turned]
    types = common.read_layer_types(config, sizes.layers, (FULL, CHUNKED), usual)
    kinds = list(zip(turned, types, strict=True))
    mixers = {
        kind: _attention(config, sizes, rope if kind[0] else None, kind[1])
        for kind in dict.fromkeys(kinds)
    }
    activation = common.read_activation(config)
    router = common.softmax_router(config, renormalises=False)
    router = router.with_policy(scoring_func="sigmoid", score_order="topk_then_score")
    router = router.with_wiring(apply_router_weight_on_input=True, shared_experts=1)
    shared = MLP(sizes.hidden, sizes.width, activation)
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width), shared)
    wide = config.int("intermediate_size_mlp", 1, common.SIZE, 16384)
    dense = MLP(sizes.hidden, wide, activation)
    sparse = _sparse(config, sizes.layers)
    layers = [
        common.pre_norm_layer(sizes, mixers[kind], moe if n in sparse else dense)
        for n, kind in enumerate(kinds)
    ]
    return common.decoder(sizes, layers)


def _turned(config: Fields, layers: int) -> list[bool]:
    """Which layers have a rope: those with a 1 in `no_rope_layers`, else all but every fourth."""
    ones = config.list("no_rope_layers", int, default=None)
    if not ones:
        every = config.int("no_rope_layer_interval", 1, 1024, 4)
        return [(n + 1) % every != 0 for n in range(layers)]
    if len(ones) < layers or set(ones) - {0, 1}:
        raise config.error("no_rope_layers", f"0 or 1 for each of {layers} layers")
    return [bool(one) for one in ones[:layers]]


def _sparse(config: Fields, layers: int) -> set[int]:
    listed = config.list("moe_layers", int, default=None)
    if listed is None:
        step = config.int("interleave_moe_layer_step", 1, 1024, 1)
        return set(range(step - 1, layers, step))
    if not set(listed) <= set(range(layers)):
        raise config.error("moe_layers", f"layers 0..{layers - 1}")
    return set(listed)


def _attention(config: Fields, sizes: common.Sizes, rope: Rope | None, kind: str) -> Attention:
    bias = config.bool("attention_bias", False)
    chunk = 0
    if kind == CHUNKED:
        if "attention_chunk_size" in config.values and not config.has("attention_chunk_size"):
            raise config.error("attention_chunk_size", f"a number where layers are {CHUNKED}")
        chunk = config.int("attention_chunk_size", 1, 1 << 30, 8192)
    mixer = replace(common.attention(sizes, rope, qkv_bias=bias, out_bias=bias), chunk=chunk)
    if rope is not None and config.bool("use_qk_norm", True):
        norm = Norm(sizes.head_dim, sizes.eps, "l2", weight=False)
        return replace(mixer, qk_norm=norm, qk_norm_after_rope=True)
    if rope is None and config.bool("attn_temperature_tuning", True):
        return replace(
            mixer,
            temperature_scale=config.float("attn_scale", 0.0, 1e3, 0.1),
            temperature_floor=config.int("floor_scale", 1, 1 << 30, 8192),
        )
    return mixer


FAMILIES = {
    "llama4_text": Family(
        "Llama 4",
        llama4,
        {**PRE_NORM_NAMES, "layers.{n}.mlp.experts": (TRANSPOSED, MLX_BARE)},
        "sigmoid of the chosen, on the expert's input",
        {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"},
    ),
}
