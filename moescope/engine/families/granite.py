"""Granite's Mixture-of-Experts models: the chosen logits are scored, every branch is multiplied; a
shared block in some, windows and sinks in others. The hybrids are `mamba`'s.

Source: transformers `modeling_granitemoe.py`, `_granitemoeshared.py`, `_granitemoe_swa.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, MoE, Rope

NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.mlp": ".block_sparse_moe",
    "layers.{n}.mlp.shared_expert": "..shared_mlp",
}


def granite_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=2048)
    mixer = _attention(config, sizes, common.read_rope(config, sizes))
    return _decoder(config, sizes, [mixer] * sizes.layers, _moe(config, sizes, 0))


def granite_moe_shared(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=2048)
    width = config.int("shared_intermediate_size", 0, common.SIZE, 0)
    mixer = _attention(config, sizes, common.read_rope(config, sizes))
    return _decoder(config, sizes, [mixer] * sizes.layers, _moe(config, sizes, width))


def granite_moe_swa(config: Fields) -> DecoderSpec:
    """Sinks in every layer; a base of its own for the rope of each, 0 for none."""
    sizes = common.read_sizes(config, eps=1e-6, context=2048)
    usual = [SLIDING if n % 4 else FULL for n in range(sizes.layers)]
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    window = config.int("sliding_window", 1, 1 << 30, 128)
    rope = common.read_rope(config, sizes)
    bases = config.list("layer_rope_theta", float, sizes.layers, default=None)
    thetas = [rope.theta] * sizes.layers if bases is None else [float(base) for base in bases]
    if any(theta and not 1.0 <= theta <= 1e15 for theta in thetas):
        raise config.error("layer_rope_theta", "0 or a base of 1..1e15 for every layer")
    ropes = {theta: replace(rope, theta=theta) if theta else None for theta in thetas}
    mixers = {
        (kind, theta): replace(
            _attention(config, sizes, ropes[theta]),
            window=window if kind == SLIDING else 0,
            sinks=True,
        )
        for kind, theta in dict.fromkeys(zip(types, thetas, strict=True))
    }
    width = config.int("shared_intermediate_size", 0, common.SIZE, 0)
    chosen = [mixers[pair] for pair in zip(types, thetas, strict=True)]
    return _decoder(config, sizes, chosen, _moe(config, sizes, width))


def _attention(config: Fields, sizes: common.Sizes, rope: Rope | None) -> Attention:
    bias = config.bool("attention_bias", False)
    scale = config.float("attention_multiplier", 1e-6, 1e6, 1.0)
    return replace(common.attention(sizes, rope, qkv_bias=bias, out_bias=bias), scale=scale)


def _moe(config: Fields, sizes: common.Sizes, shared: int) -> MoE:
    router = common.softmax_router(config, renormalises=False)
    router = router.with_policy(score_order="topk_then_score")
    block = None
    if shared:
        block = MLP(sizes.hidden, shared, common.read_activation(config))
        router = router.with_wiring(shared_experts=1)
    return MoE(sizes.hidden, router, common.experts(config, sizes.width), block)


def _decoder(
    config: Fields, sizes: common.Sizes, mixers: Sequence[Attention], moe: MoE
) -> DecoderSpec:
    factor = config.float("residual_multiplier", default=1.0)
    plain = [common.pre_norm_layer(sizes, mixer, moe) for mixer in mixers]
    layers = [
        replace(layer, branches=tuple(replace(b, multiplier=factor) for b in layer.branches))
        for layer in plain
    ]
    return replace(
        common.decoder(sizes, layers),
        embedding_scale=config.float("embedding_multiplier", default=1.0),
        logit_scale=1.0 / config.float("logits_scaling", 1e-6, 1e6, 1.0),
    )


_KEYS = {
    "moe_intermediate_size": "intermediate_size",
    "shared_expert_intermediate_size": "shared_intermediate_size",
    "num_experts": "num_local_experts",
}
_CHOSEN = "softmax over the chosen"
FAMILIES = {
    "granitemoe": Family("Granite 3 MoE", granite_moe, NAMES, _CHOSEN, _KEYS),
    "granitemoeshared": Family(
        "Granite MoE with a shared block", granite_moe_shared, NAMES, _CHOSEN, _KEYS
    ),
    "granitemoe_swa": Family("Granite Swash", granite_moe_swa, NAMES, _CHOSEN, _KEYS),
}
