"""Qwen2-MoE, Qwen3-MoE and the text of its towers: sparse steps, dense layers by list, and a gated
shared expert in Qwen2.

Sources: arXiv 2407.10671 and 2505.09388; transformers `modeling_qwen2_moe.py` and
`modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.families.family import Family, NoteIf
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MLP, Attention, Experts, MoE
from moescope.kernels.spec import RouterSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def qwen2_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=32768, kv_heads=16)
    shared = MLP(
        sizes.hidden,
        config.int("shared_expert_intermediate_size", 1, common.SIZE),
        common.read_activation(config),
    )
    router = common.softmax_router(config, shared=1)
    moe = MoE(sizes.hidden, router, _experts(config), shared)
    rope = common.read_rope(config, sizes)
    bias = config.bool("qkv_bias", True)
    windows = _windows(config, sizes.layers)
    mixers = [common.attention(sizes, rope, window=w, qkv_bias=bias) for w in windows]
    return _layers(config, sizes, mixers, moe)


def qwen3_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=32768, kv_heads=4)
    moe = MoE(sizes.hidden, common.softmax_router(config), _experts(config))
    bias = config.bool("attention_bias", False)
    window = _window(config)
    mixer = common.attention(
        sizes,
        common.read_rope(config, sizes),
        window=window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
    )
    _expect_layer_types(config, SLIDING if window else FULL)
    return _layers(config, sizes, [mixer] * sizes.layers, moe)


def qwen3_vl_moe(config: Fields) -> DecoderSpec:
    """The text of Qwen3-VL: always renormalised; text has the same position on every axis."""
    sizes = common.read_sizes(config, eps=1e-6, context=128000, kv_heads=16)
    sizes = replace(sizes, tied=config.bool("tie_word_embeddings", True))
    router = common.softmax_router(config, renormalises=True)
    return _of_towers(config, sizes, 500000.0, router)


def qwen3_omni_moe(config: Fields) -> DecoderSpec:
    """The text of Qwen3-Omni's thinker."""
    sizes = common.read_sizes(config, eps=1e-6, context=32768, kv_heads=4)
    if config.has("sliding_window"):
        raise config.error("sliding_window", "null for this model type")
    router = common.softmax_router(config, usual_norm=True)
    return _of_towers(config, sizes, 1000000.0, router)


def _of_towers(
    config: Fields, sizes: common.Sizes, theta: float, router: RouterSpec
) -> DecoderSpec:
    rope = common.read_rope(config, sizes, usual_theta=theta)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias, qk_norm="per_head")
    moe = MoE(sizes.hidden, router, _experts(config))
    return _layers(config, sizes, [mixer] * sizes.layers, moe)


def _experts(config: Fields) -> Experts:
    return common.experts(config, config.int("moe_intermediate_size", 1, common.SIZE))


def _layers(config: Fields, sizes: common.Sizes, mixers: list[Attention], moe: MoE) -> DecoderSpec:
    """A layer is sparse by `decoder_sparse_step`, unless `mlp_only_layers` names it."""
    step = config.int("decoder_sparse_step", 1, 1024, 1)
    dense = set(config.list("mlp_only_layers", int, default=[]))
    if not dense <= set(range(sizes.layers)):
        raise config.error("mlp_only_layers", f"layers 0..{sizes.layers - 1}")
    mlp = MLP(sizes.hidden, sizes.width, common.read_activation(config))
    sparse = [n not in dense and (n + 1) % step == 0 for n in range(sizes.layers)]
    blocks = [moe if wanted else mlp for wanted in sparse]
    layers = [common.pre_norm_layer(sizes, *pair) for pair in zip(mixers, blocks, strict=True)]
    return common.decoder(sizes, layers)


def _window(config: Fields) -> int:
    """0: none. An absent width is 4096, one that is null is none (transformers' config classes)."""
    null = "sliding_window" in config.values and not config.has("sliding_window")
    if null or not config.bool("use_sliding_window", False):
        return 0
    return config.int("sliding_window", 1, 1 << 30, 4096)


def _windows(config: Fields, layers: int) -> list[int]:
    """Per layer: by `layer_types`, else every other layer below `max_window_layers`."""
    window = _window(config)
    types = config.list("layer_types", str, layers, default=None)
    if types is None:
        below = config.int("max_window_layers", 0, 1024, 28)
        return [window if n < below and n % 2 == 0 else 0 for n in range(layers)]
    if unknown := set(types) - {FULL, SLIDING}:
        raise config.error("layer_types", f"{FULL} or {SLIDING}, not {sorted(unknown)[0]}")
    if SLIDING in types and not window:
        raise config.error("layer_types", f"no {SLIDING} where use_sliding_window is false")
    return [window if kind == SLIDING else 0 for kind in types]


def _expect_layer_types(config: Fields, kind: str) -> None:
    if set(config.list("layer_types", str, default=[])) - {kind}:
        raise config.error("layer_types", f"{kind} in every layer")


_NEVER = NoteIf(
    "mlx-lm (0.32) ignores norm_topk_prob and never renormalises; transformers, and moescope, do",
    lambda config: config.raw("norm_topk_prob") is True,
)
FAMILIES = {
    "qwen2_moe": Family(
        "Qwen2-MoE",
        qwen2_moe,
        PRE_NORM_NAMES,
        "not renormalised, gated shared expert",
        notes=(_NEVER,),
    ),
    "qwen3_moe": Family("Qwen3-MoE", qwen3_moe, PRE_NORM_NAMES, "renormalised"),
    "qwen3_vl_moe_text": Family(
        "Qwen3-VL-MoE", qwen3_vl_moe, PRE_NORM_NAMES, "always renormalised"
    ),
    "qwen3_omni_moe_text": Family("Qwen3-Omni", qwen3_omni_moe, PRE_NORM_NAMES, "renormalised"),
}
