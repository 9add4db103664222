"""Gemma 4, the text tower of its Mixture-of-Experts size: a router that reads the residual through
a norm and a scale of its own, a dense block beside the experts, and two shapes of attention.

Source: transformers `modeling_gemma4.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, Experts, MoE, Norm, Pass

NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.scale": ".layer_scalar",
    "layers.{n}.attention.post_norm": "..post_attention_layernorm",
    "layers.{n}.dense": ".mlp",
    "layers.{n}.dense.pre_norm": "..pre_feedforward_layernorm",
    "layers.{n}.dense.post_norm": "..post_feedforward_layernorm_1",
    "layers.{n}.mlp": "model.layers.{n}",  # router and experts stand in the layer itself
    "layers.{n}.mlp.pre_norm": ".pre_feedforward_layernorm_2",
    "layers.{n}.mlp.post_norm": ".post_feedforward_layernorm_2",
    "layers.{n}.sum": ".sum",
    "layers.{n}.sum.post_norm": "..post_feedforward_layernorm",
}
_KINDS = ("default", "proportional", "linear", "yarn")
_NOT_IMPLEMENTED = (
    ("hidden_size_per_layer_input", 256, "0: inputs of each layer's own are not implemented"),
    ("num_kv_shared_layers", 0, "0: layers that share keys and values are not implemented"),
)


def gemma4(config: Fields) -> DecoderSpec:
    for key, usual, expected in _NOT_IMPLEMENTED:
        if config.int(key, 0, common.SIZE, usual):
            raise config.error(key, expected)
    config.str("use_bidirectional_attention", ("vision",), default="vision")
    sizes = common.read_sizes(config, eps=1e-6, context=131072, kv_heads=4, head_dim=256)
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    activation = common.read_activation(config, "hidden_activation", "gelu_pytorch_tanh")
    dense = Branch("dense", MLP(sizes.hidden, sizes.width, activation), norm, norm, adds_to="sum")
    layers = []
    types = _layer_types(config, sizes.layers)
    shapes = [(kind, *_shape(config, sizes, number, kind)) for number, kind in enumerate(types)]
    mixers = {shape: _attention(config, sizes, *shape) for shape in dict.fromkeys(shapes)}
    for mixer in map(mixers.__getitem__, shapes):
        blocks = [Branch("attention", mixer, norm, norm), dense]
        if config.bool("enable_moe_block", False):
            moe = _moe(config, sizes, Experts(_width(config), activation))
            blocks.append(Branch("mlp", moe, norm, norm, adds_to="sum"))
        blocks.append(Branch("sum", Pass(), post_norm=norm, reads="sum"))
        layers.append(Layer(tuple(blocks), learned_scale=True))
    tied = config.bool("tie_word_embeddings", True)
    spec = common.decoder(replace(sizes, tied=tied), layers, final_norm=norm)
    return replace(
        spec,
        embedding_scale=sizes.hidden**0.5,
        logit_softcap=config.float("final_logit_softcapping", 1e-3, 1e6, default=0.0),
    )


def _width(config: Fields) -> int:
    return config.int("moe_intermediate_size", 1, common.SIZE)


def _moe(config: Fields, sizes: common.Sizes, experts: Experts) -> MoE:
    router = common.softmax_router(
        config, renormalises=True, combine="float32", chosen_key="top_k_experts"
    )
    router = router.with_policy(per_expert_scale=True)
    router = router.with_wiring(router_input="residual_rms_scaled")
    norm = Norm(sizes.hidden, sizes.eps, weight=False, applies="float32")
    return MoE(sizes.hidden, router, experts, router_norm=norm)


def _layer_types(config: Fields, layers: int) -> list[str]:
    """Every sixth layer is full, and the last one always."""
    usual = [SLIDING if (n + 1) % 6 else FULL for n in range(layers)]
    types = common.read_layer_types(config, layers, (FULL, SLIDING), usual)
    return [*types[:-1], FULL]


def _attention(
    config: Fields, sizes: common.Sizes, kind: str, head_dim: int, kv_heads: int
) -> Attention:
    """Full layers may use keys for values; scores are not scaled."""
    source = ropes.rope_of_type(config, kind)
    if source is None:
        raise config.error("rope_parameters", f"an object with {FULL} and {SLIDING}")
    rope = ropes.read_rope(config, head_dim, sizes.context, kinds=_KINDS, source=source)
    bias = config.bool("attention_bias", False)
    per_head = Norm(head_dim, sizes.eps, applies="float32")
    return Attention(
        sizes.hidden,
        sizes.heads,
        kv_heads,
        head_dim,
        1.0,
        rope,
        window=config.int("sliding_window", 1, 1 << 30, 512) if kind == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=per_head,
        v_norm=replace(per_head, weight=False),
        keys_are_values=_keys_are_values(config, kind),
    )


def _keys_are_values(config: Fields, kind: str) -> bool:
    return kind == FULL and config.bool("attention_k_eq_v", False)


def _shape(config: Fields, sizes: common.Sizes, layer: int, kind: str) -> tuple[int, int]:
    """Head width and key heads of a layer: by `per_layer_config`, or those of all full layers."""
    head_dim, kv_heads = sizes.head_dim, sizes.kv_heads
    if (every := config.fields("per_layer_config")) is not None:
        own = every.fields(str(layer)) or Fields({})
        if unknown := set(own.values) - {"head_dim", "num_key_value_heads"}:
            raise own.error(sorted(unknown)[0], "no such key: it is not implemented")
    elif kind == FULL:
        wide = {"head_dim": config.raw("global_head_dim") or 512}
        if _keys_are_values(config, kind):
            wide["num_key_value_heads"] = config.raw("num_global_key_value_heads")
        own = Fields(wide)
    else:
        own = Fields({})
    head_dim = own.int("head_dim", 2, common.SIZE, head_dim)
    kv_heads = own.int("num_key_value_heads", 1, common.COUNT, kv_heads)
    if sizes.heads % kv_heads:
        raise own.error("num_key_value_heads", f"a divisor of num_attention_heads {sizes.heads}")
    return head_dim, kv_heads


FAMILIES = {
    "gemma4_text": Family(
        "Gemma 4",
        gemma4,
        NAMES,
        "renormalised, a scale for each expert",
        {"num_experts_per_tok": "top_k_experts"},
        notes=("mlx-lm (0.32) scores in bfloat16 where transformers, and moescope, use float32",),
    ),
}
