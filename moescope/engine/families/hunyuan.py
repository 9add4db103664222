"""Hunyuan-A13B: always renormalised, a shared block, q/k norms after the rope, and a rope
whose base is stretched by an alpha.

Source: transformers `modeling_hunyuan_v1_moe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.forms import In
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, MoE
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

# Older checkpoints have q, k and v in one tensor, and up and gate.
NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention.qkv": In(".qkv_proj", "qkv by group"),
}
_CHOSEN = ("moe_topk", "num_experts_per_tok")
# Keys that this version of the family has one meaning for.
_FIXED = (("use_mixed_mlp_moe", True), ("use_qk_norm", True), ("use_cla", False))


def hunyuan_v1_moe(config: Fields) -> DecoderSpec:
    """How many experts a token takes may differ from layer to layer."""
    sizes = common.read_sizes(config, eps=1e-5, context=2048)
    for key, value in _FIXED:
        if config.bool(key, value) != value:
            raise config.error(key, str(value).lower())
    if config.int("attention_head_dim", 1, common.SIZE, sizes.head_dim) != sizes.head_dim:
        raise config.error("attention_head_dim", f"head_dim {sizes.head_dim}")
    for key, expected in (("moe_intermediate_size", sizes.width), ("num_shared_expert", 1)):
        if set(_per_layer(config, (key,), sizes.layers, expected)) - {expected}:
            raise config.error(key, f"{expected} in every layer")
    kinds = ("default", "linear", "dynamic")
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context, kinds=kinds)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias, qk_norm="per_head")
    mixer = replace(mixer, qk_norm_after_rope=True)
    layers = [
        common.pre_norm_layer(sizes, mixer, _moe(config, sizes, chosen))
        for chosen in _per_layer(config, _CHOSEN, sizes.layers, 1)
    ]
    return common.decoder(sizes, layers)


def _moe(config: Fields, sizes: common.Sizes, chosen: int) -> MoE:
    experts = config.int(("num_experts", "num_local_experts"), 1, common.COUNT)
    if chosen > experts:
        raise config.error(_CHOSEN, f"at most num_experts {experts}")
    router = RouterSpec(
        RouterPolicy(chosen, norm_topk_prob=True),
        RouterWiring(experts, router_dtype="float32", combine_dtype="float32", shared_experts=1),
    )
    shared = MLP(sizes.hidden, sizes.width, common.read_activation(config))
    return MoE(sizes.hidden, router, common.experts(config, sizes.width), shared)


def _per_layer(config: Fields, key: tuple[str, ...], layers: int, usual: int) -> list[int]:
    """One number, or a list of one for each layer."""
    if isinstance(config.raw(key), list):
        found = config.list(key, int, layers)
        if min(found) < 1:
            raise config.error(key, "numbers of at least 1")
        return found
    return [config.int(key, 1, common.SIZE, usual)] * layers


FAMILIES = {
    "hunyuan_v1_moe": Family(
        "Hunyuan-A13B",
        hunyuan_v1_moe,
        NAMES,
        "always renormalised",
        {
            "moe_intermediate_size": "intermediate_size",
            "shared_expert_intermediate_size": "intermediate_size",
        },
        notes=("mlx-lm (0.32) never renormalises the weights of this family; transformers does",),
    ),
}
