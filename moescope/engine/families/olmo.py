"""OLMoE and FlexOlmo: flat q/k norms, no renormalisation; FlexOlmo normalises after each block."""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common
from moescope.engine.families.family import Family, NoteIf
from moescope.engine.families.names import POST_NORM_NAMES, PRE_NORM_NAMES
from moescope.engine.operators import MoE, Norm


def olmoe(config: Fields) -> DecoderSpec:
    """arXiv 2409.02060; transformers `modeling_olmoe.py`. `clip_qkv` clamps after the norms."""
    sizes = common.read_sizes(config, eps=1e-5, context=4096)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(
        sizes,
        common.read_rope(config, sizes),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="flat",
        clip_qkv=config.float("clip_qkv", 0.0, default=None),
    )
    router = common.softmax_router(config)
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    layer = common.pre_norm_layer(sizes, mixer, moe)
    return common.decoder(sizes, [layer] * sizes.layers)


def flex_olmo(config: Fields) -> DecoderSpec:
    """arXiv 2507.07024; transformers `modeling_flex_olmo.py`: norms and rope round once, at the
    end, and the router reads the residual as it is."""
    sizes = common.read_sizes(config, eps=1e-6, context=4096)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(
        sizes,
        common.read_rope(config, sizes, usual_theta=500000.0, applies="float32"),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="flat",
        norm_applies="float32",
    )
    router = common.softmax_router(config).with_wiring(router_input="residual")
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    layer = Layer((Branch("attention", mixer, post_norm=norm), Branch("mlp", moe, post_norm=norm)))
    return common.decoder(sizes, [layer] * sizes.layers, applies="float32")


_WIDTH = {"moe_intermediate_size": "intermediate_size"}
_CLIP = NoteIf(
    "mlx-lm (0.32) ignores clip_qkv; transformers, and moescope, clamp queries, keys and values",
    lambda config: config.has("clip_qkv"),
)
FAMILIES = {
    "olmoe": Family("OLMoE", olmoe, PRE_NORM_NAMES, "not renormalised", _WIDTH, (_CLIP,)),
    "flex_olmo": Family("FlexOlmo", flex_olmo, POST_NORM_NAMES, "not renormalised", _WIDTH),
}
