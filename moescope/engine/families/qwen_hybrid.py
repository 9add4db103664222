"""Qwen3-Next and Qwen3.5-MoE: three layers of gated delta rule to one of gated attention, norms
that hold w of 1 + w, and a gated shared expert.

Sources: arXiv 2412.06464 (the mixer); transformers `modeling_qwen3_next.py` and
`modeling_qwen3_5_moe.py`.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.forms import In
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, LinearAttention, MoE, Norm, Operator
from moescope.kernels.spec import RouterSpec

LINEAR, FULL = "linear_attention", "full_attention"

_ZERO_CENTRED = ("attention.pre_norm", "mlp.pre_norm", "attention.q_norm", "attention.k_norm")
_PLACES = ("..input_layernorm", "..post_attention_layernorm", ".q_norm", ".k_norm")
NAMES: Names = {
    **PRE_NORM_NAMES,
    "final_norm": In("model.norm", mlx="plus one"),
    **{
        f"layers.{{n}}.{ours}": In(theirs, mlx="plus one")
        for ours, theirs in zip(_ZERO_CENTRED, _PLACES, strict=True)
    },
    "layers.{n}.linear": ".linear_attn",
    "layers.{n}.linear.pre_norm": In("..input_layernorm", mlx="plus one"),
    "unread": ("mtp.*", "*.mtp.*"),
}


def qwen3_next(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=32768, kv_heads=2, head_dim=256)
    router = common.softmax_router(config, shared=1, usual_norm=True)
    step = config.int("decoder_sparse_step", 1, 1024, 1)
    dense = set(config.list("mlp_only_layers", int, default=[]))
    if not dense <= set(range(sizes.layers)):
        raise config.error("mlp_only_layers", f"layers 0..{sizes.layers - 1}")
    sparse = [n not in dense and (n + 1) % step == 0 for n in range(sizes.layers)]
    return _decoder(config, sizes, _moe(config, sizes, router), sparse)


def qwen3_5_moe(config: Fields) -> DecoderSpec:
    """Every layer routes, and always renormalises: there is no key for it."""
    sizes = common.read_sizes(config, eps=1e-6, context=32768, kv_heads=2, head_dim=256, width=0)
    router = common.softmax_router(config, shared=1, renormalises=True)
    return _decoder(config, sizes, _moe(config, sizes, router), [True] * sizes.layers)


def _moe(config: Fields, sizes: common.Sizes, router: RouterSpec) -> MoE:
    width = config.int("moe_intermediate_size", 1, common.SIZE, 512)
    shared = config.int("shared_expert_intermediate_size", 1, common.SIZE, 512)
    activation = common.read_activation(config)
    return MoE(
        sizes.hidden, router, common.experts(config, width), MLP(sizes.hidden, shared, activation)
    )


def _decoder(config: Fields, sizes: common.Sizes, moe: MoE, sparse: list[bool]) -> DecoderSpec:
    norm = Norm(sizes.hidden, sizes.eps, "rms_zero_centred", applies="float32")
    mixers: dict[str, tuple[str, Operator]] = {
        LINEAR: ("linear", _delta(config, sizes)),
        FULL: ("attention", _attention(config, sizes)),
    }
    dense = MLP(sizes.hidden, max(sizes.width, 1), common.read_activation(config))
    layers = []
    for kind, routed in zip(_layer_types(config, sizes.layers), sparse, strict=True):
        name, mixer = mixers[kind]
        block = Branch("mlp", moe if routed else dense, norm)
        layers.append(Layer((Branch(name, mixer, norm), block)))
    return common.decoder(sizes, layers, final_norm=norm)


def _layer_types(config: Fields, layers: int) -> list[str]:
    """By `layer_types`, else every `full_attention_interval`-th layer attends."""
    types = config.list("layer_types", str, layers, default=None)
    if types is None:
        every = config.int("full_attention_interval", 1, 1024, 4)
        return [FULL if (n + 1) % every == 0 else LINEAR for n in range(layers)]
    if unknown := set(types) - {LINEAR, FULL}:
        raise config.error("layer_types", f"{LINEAR} or {FULL}, not {sorted(unknown)[0]}")
    return list(types)


def _attention(config: Fields, sizes: common.Sizes) -> Attention:
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context, partial=0.25)
    bias = config.bool("attention_bias", False)
    return Attention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=Norm(sizes.head_dim, sizes.eps, "rms_zero_centred", applies="float32"),
        gate="in_q_proj",
    )


def _delta(config: Fields, sizes: common.Sizes) -> LinearAttention:
    key_heads = config.int("linear_num_key_heads", 1, common.COUNT, 16)
    value_heads = config.int("linear_num_value_heads", 1, common.COUNT, 32)
    if value_heads % key_heads:
        raise config.error("linear_num_value_heads", f"a multiple of {key_heads} key heads")
    value_dim = config.int("linear_value_head_dim", 1, common.COUNT, 128)
    return LinearAttention(
        sizes.hidden,
        "gated_delta",
        key_heads,
        value_heads,
        config.int("linear_key_head_dim", 1, common.COUNT, 128),
        value_dim,
        config.int("linear_conv_kernel_dim", 2, 64, 4),
        Norm(value_dim, sizes.eps),
    )


_RELEASED = "renormalised, gated shared expert"
FAMILIES = {
    "qwen3_next": Family("Qwen3-Next", qwen3_next, NAMES, _RELEASED),
    "qwen3_5_moe_text": Family("Qwen3.5-MoE", qwen3_5_moe, NAMES, _RELEASED),
}
