"""MiniMax-M3's text: clamped SwiGLU everywhere, the routed output scaled, block-sparse attention.

Source: transformers `modeling_minimax_m3_vl.py`. Sparse layers choose blocks of keys; up to as many
tokens as the chosen blocks hold they attend to all of them, and a lane is held to that.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, Experts, MoE, Norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

SPARSE, FULL = "minimax_m3_sparse", "full_attention"

NAMES: Names = {
    **PRE_NORM_NAMES,
    "unread": ("*.indexer.*", "*.index_*"),
}


def minimax_m3(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(
        config, eps=1e-6, context=524288, kv_heads=4, head_dim=128, width=3072
    )
    norm = Norm(sizes.hidden, sizes.eps, "rms_zero_centred", applies="float32")
    attention = _attention(config, sizes)
    moe = MoE(sizes.hidden, _router(config), _experts(config, sizes.width), _shared(config, sizes))
    dense = _mlp(config, sizes, config.int("dense_intermediate_size", 1, common.SIZE, 12288))
    feeds = biased.blocks(_sparse_feeds(config, sizes.layers), moe, dense)
    layers = [Layer((Branch("attention", attention, norm), Branch("mlp", f, norm))) for f in feeds]
    spec = common.decoder(sizes, layers, final_norm=norm)
    return replace(spec, context=_context(config, sizes))


def _attention(config: Fields, sizes: common.Sizes) -> Attention:
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context, usual_theta=5e6)
    if config.int("rotary_dim", 1, common.COUNT, rope.dims) != rope.dims:
        raise config.error("rotary_dim", f"the part that partial_rotary_factor gives, {rope.dims}")
    return Attention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        rope,
        qk_norm=Norm(sizes.head_dim, sizes.eps, "rms_zero_centred", applies="float32"),
    )


def _context(config: Fields, sizes: common.Sizes) -> int:
    """Tokens up to which every layer sees all keys."""
    inner = config.fields("sparse_attention_config") or Fields({})
    marked = inner.list("sparse_attention_freq", int, sizes.layers, default=None)
    usual = [SPARSE if flag else FULL for flag in marked] if marked else [FULL] * sizes.layers
    types = config.list("layer_types", str, sizes.layers, default=usual)
    if unknown := set(types) - {SPARSE, FULL}:
        raise config.error("layer_types", f"{SPARSE} or {FULL}, not {sorted(unknown)[0]}")
    if SPARSE not in types:
        return sizes.context
    size, count = (
        inner.int(theirs, 1, common.SIZE, config.int(ours, 1, common.SIZE, usual))
        for theirs, ours, usual in (
            ("sparse_block_size", "index_block_size", 128),
            ("sparse_topk_blocks", "index_topk_blocks", 16),
        )
    )
    return min(sizes.context, size * count)


def _sparse_feeds(config: Fields, layers: int) -> list[bool]:
    flags = config.raw("moe_layer_freq")
    if isinstance(flags, list) and not config.has("mlp_layer_types"):
        return [bool(flag) for flag in config.list("moe_layer_freq", int, layers)]
    return biased.typed_layers(config, layers, [True] * layers)


def _router(config: Fields) -> RouterSpec:
    experts, chosen = biased.read_counts(config, 4)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        correction_bias="score",
        norm_topk_prob=True,
        routed_scaling_factor=biased.read_scale(config, 2.0),
        scale_site="routed_output",
    )
    return RouterSpec(policy, RouterWiring(experts, shared_experts=1, combine_dtype="float32"))


def _experts(config: Fields, width: int) -> Experts:
    alpha, limit = _clamp(config)
    return Experts(width, "swiglu_oai", limit=limit, alpha=alpha, up_shift=1.0)


def _shared(config: Fields, sizes: common.Sizes) -> MLP:
    return _mlp(config, sizes, config.int("shared_intermediate_size", 1, common.SIZE, 3072))


def _mlp(config: Fields, sizes: common.Sizes, width: int) -> MLP:
    alpha, limit = _clamp(config)
    return MLP(sizes.hidden, width, "swiglu_oai", limit=limit, alpha=alpha, up_shift=1.0)


def _clamp(config: Fields) -> tuple[float, float]:
    return (
        config.float("swiglu_alpha", 1e-6, 1e6, 1.702),
        config.float("swiglu_limit", 1e-6, 1e6, 7.0),
    )


_RELEASED = "renormalised sigmoid, biased choice, routed output scaled"
FAMILIES = {
    "minimax_m3_vl_text": Family(
        "MiniMax-M3",
        minimax_m3,
        NAMES,
        _RELEASED,
        {"moe_intermediate_size": "intermediate_size"},
        notes=(
            "sparse layers see every key up to index_topk_blocks × index_block_size tokens; lanes "
            "end there",
            "routed_scaling_factor is on the experts' sum, as in transformers; mlx-lm has it in "
            "the weights, so weights recorded there differ by the factor",
        ),
    ),
}
