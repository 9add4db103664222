"""Command A's Mixture-of-Experts: attention and experts read the same normalised residual, and what
is shared is averaged with what is routed.

Source: transformers `modeling_cohere2_moe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, MoE, Norm, Pass
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

DENSE, SPARSE = "dense", "sparse"
NAMES: Names = {**PRE_NORM_NAMES, "layers.{n}.mlp.pre_norm": "..input_layernorm"}


def cohere2_moe(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-5, context=8192, head_dim=128)
    sizes = replace(sizes, tied=config.bool("tie_word_embeddings", True))
    norm = _norm(config, sizes)
    kinds = list(zip(*_layer_kinds(config, sizes.layers), strict=True))
    mixers = {kind: _attention(config, sizes, *kind) for kind in dict.fromkeys(kinds)}
    width = config.int("prefix_dense_intermediate_size", 1, common.SIZE, sizes.width)
    dense = MLP(sizes.hidden, width, common.read_activation(config))
    moe = _moe(config, sizes)
    layers = []
    for kind in kinds:
        block = dense if kind[1] == DENSE else moe
        both = (
            Branch("attention", mixers[kind], norm, adds_to="sum"),
            Branch("mlp", block, norm, adds_to="sum"),
        )
        layers.append(Layer((*both, Branch("sum", Pass(), reads="sum"))))
    spec = common.decoder(sizes, layers, final_norm=norm)
    return replace(spec, logit_scale=config.float("logit_scale", 1e-6, 1e6, 0.0625))


def _norm(config: Fields, sizes: common.Sizes) -> Norm:
    if config.has("rms_norm_eps"):
        return Norm(sizes.hidden, sizes.eps)
    eps = config.float("layer_norm_eps", 0.0, 1.0, 1e-5)
    return Norm(sizes.hidden, eps, "layer", applies="float32")


def _layer_kinds(config: Fields, layers: int) -> tuple[list[str], list[str]]:
    """What attends and what follows: by their lists, or by the number of dense layers before all
    others and the period of full layers in each part."""
    first = config.int("first_k_dense_replace", 0, layers, 0)
    parts = (
        ("prefix_dense_sliding_window_pattern", 1, first),
        ("sliding_window_pattern", 4, layers - first),
    )
    attends = [
        SLIDING if (n + 1) % config.int(key, 1, 1024, usual) else FULL
        for key, usual, count in parts
        for n in range(count)
    ]
    feeds = [DENSE if n < first else SPARSE for n in range(layers)]
    return (
        common.read_layer_types(config, layers, (FULL, SLIDING), attends),
        common.read_layer_types(config, layers, (DENSE, SPARSE), feeds, "mlp_layer_types"),
    )


def _attention(config: Fields, sizes: common.Sizes, attends: str, feeds: str) -> Attention:
    """Sliding layers have a rope; full ones only where they are dense, under one more condition."""
    rope = ropes.read_rope(config, sizes.head_dim, sizes.context, style="interleaved")
    alone = config.int("prefix_dense_sliding_window_pattern", 1, 1024, 1) == 1
    turns = attends == SLIDING or (feeds == DENSE and alone)
    if "sliding_window" in config.values and not config.has("sliding_window"):
        raise config.error("sliding_window", "a number")
    window = config.int("sliding_window", 1, 1 << 30, 4096)
    bias = config.bool("attention_bias", False)
    return common.attention(
        sizes,
        rope if turns else None,
        window=window if attends == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
    )


def _moe(config: Fields, sizes: common.Sizes) -> MoE:
    experts, chosen = common.read_counts(config)
    shared = config.int("num_shared_experts", 0, common.COUNT, 0)
    how = config.str("shared_expert_combination_strategy", ("average", "sum"), default="average")
    policy = RouterPolicy(chosen, score_order="topk_then_score")
    if config.str("expert_selection_fn", ("softmax", "sigmoid"), default="softmax") == "sigmoid":
        policy = replace(
            policy,
            scoring_func="sigmoid",
            score_dtype="model",
            norm_topk_prob=config.bool("norm_topk_prob", True),
        )
    wiring = RouterWiring(
        experts,
        shared_experts=shared,
        shared_combination="average" if shared and how == "average" else "add",
    )
    activation = common.read_activation(config)
    block = MLP(sizes.hidden, sizes.width * shared, activation) if shared else None
    router = RouterSpec(policy, wiring)
    return MoE(sizes.hidden, router, common.experts(config, sizes.width), block)


FAMILIES = {
    "cohere2_moe": Family(
        "Command A MoE",
        cohere2_moe,
        NAMES,
        "softmax over the chosen",
        {
            "moe_intermediate_size": "intermediate_size",
            "shared_expert_intermediate_size": "intermediate_size",
        },
    ),
}
