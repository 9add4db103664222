"""ERNIE 4.5: experts are chosen by softmax score plus a bias, weighted by the score alone.

Source: transformers `modeling_ernie4_5_moe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, SYNONYMS, Constant, Names
from moescope.engine.operators import MLP, MoE
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

_BIAS = SYNONYMS["gate.correction_bias"]
assert isinstance(_BIAS, tuple)
NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.mlp.gate.correction_bias": (*_BIAS, Constant(0.0, mlx=True)),
}


def ernie4_5_moe(config: Fields) -> DecoderSpec:
    """Layers route from `moe_layer_start_index` to `moe_layer_end_index`, every so many."""
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=4)
    sizes = replace(sizes, tied=config.bool("tie_word_embeddings", True))
    rope = ropes.read_rope(
        config,
        sizes.head_dim,
        sizes.context,
        usual_theta=500000.0,
        applies="float32",
        style="interleaved",
    )
    bias = config.bool("use_bias", False)
    mixer = common.attention(sizes, rope, qkv_bias=bias, out_bias=bias)
    moe = _moe(config, sizes, bias)
    dense = MLP(sizes.hidden, sizes.width, common.read_activation(config), bias=bias)
    first = config.int("moe_layer_start_index", 0, 1024, 1)
    last = config.int("moe_layer_end_index", -1, 1024, -1)
    last = sizes.layers - 1 if last == -1 else last
    every = config.int("moe_layer_interval", 1, 1024, 1)
    sparse = [first <= n <= last and (n + 1) % every == 0 for n in range(sizes.layers)]
    layers = [common.pre_norm_layer(sizes, mixer, moe if routed else dense) for routed in sparse]
    return replace(common.decoder(sizes, layers), head_bias=bias)


def _moe(config: Fields, sizes: common.Sizes, bias: bool) -> MoE:
    experts = config.int(("moe_num_experts", "num_experts"), 1, common.COUNT)
    chosen = config.int(("moe_k", "num_experts_per_tok"), 1, min(64, experts), min(6, experts))
    shared = config.int("moe_num_shared_experts", 0, common.COUNT, 2)
    width = config.int("moe_intermediate_size", 1, common.SIZE, 1536)
    policy = RouterPolicy(
        chosen,
        correction_bias="score",
        norm_topk_prob=True,
        norm_eps=config.float("moe_norm_min", 0.0, 1.0, 1e-12),
        norm_eps_mode="clamp",
    )
    wiring = RouterWiring(experts, router_dtype="float32", shared_experts=shared)
    activation = common.read_activation(config)
    block = MLP(sizes.hidden, width * shared, activation, bias=bias) if shared else None
    return MoE(sizes.hidden, RouterSpec(policy, wiring), common.experts(config, width), block)


FAMILIES = {
    "ernie4_5_moe": Family(
        "ERNIE 4.5",
        ernie4_5_moe,
        NAMES,
        "biased choice, renormalised",
        {"num_experts": "moe_num_experts"},
        notes=(
            "mlx-lm (0.32) leaves the selection bias out, so it chooses other experts; "
            "transformers, and moescope, use it",
        ),
    ),
}
