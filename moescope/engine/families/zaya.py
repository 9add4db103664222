"""ZAYA1: attention convolved over the last tokens, a router that is a network of its own and hands
what it found on to the next one, a class of tokens that no expert sees, and learned sums.

Sources: transformers `modeling_zaya.py`; arXiv 2510.04476 (the attention), 2511.17127 (the model).
The router scores in the model's dtype; the residual is float32.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import common, ropes
from moescope.engine.families.family import Family
from moescope.engine.families.forms import In
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import ConvolvedAttention, GateNetwork, MoE, Norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

FULL, SLIDING = "hybrid", "hybrid_sliding"
THETAS = {FULL: 5e6, SLIDING: 10000.0}  # of a config that says nothing of ropes
LEGACY = ("zaya_layers", "zaya_mlp_expansion", "zaya_use_eda", "zaya_use_mod", "moe_router_topk")
STATE = "router_state"

_CONV = ".qkv_proj.conv_qk_"
_MLP = ".router_mlp."
NAMES: Names = {
    **PRE_NORM_NAMES,
    "embed.shift": "model.input_hidden_states_bias",
    "embed.gain": "model.input_hidden_states_scale",
    "layers.{n}.attention.q_proj": ".qkv_proj.q_proj",
    "layers.{n}.attention.k_proj": ".qkv_proj.k_proj",
    "layers.{n}.attention.v_proj": ".qkv_proj.v_proj_current",
    "layers.{n}.attention.v_before": ".qkv_proj.v_proj_delayed",
    "layers.{n}.attention.channel_conv": f"{_CONV}depthwise",
    "layers.{n}.attention.channel_conv.weight": In(".weight", "squeezed"),
    "layers.{n}.attention.head_conv": f"{_CONV}grouped",
    "layers.{n}.attention.key_scale": ".qk_norm.temp",
    "layers.{n}.attention.sum": "..post_attention_residual_scale",
    "layers.{n}.mlp.sum": "..post_mlp_residual_scale",
    **{
        f"layers.{{n}}.{branch}.sum.{ours}": f".{theirs}"
        for branch in ("attention", "mlp")
        for ours, theirs in (
            ("shift", "hidden_states_bias"),
            ("gain", "hidden_states_scale"),
            ("kept_shift", "residual_bias"),
            ("kept_gain", "residual_scale"),
        )
    },
    "layers.{n}.mlp.gate": ".gate",
    "layers.{n}.mlp.gate.down": ".down_proj",
    "layers.{n}.mlp.gate.carried": ".router_states_scale",
    "layers.{n}.mlp.gate.norm": f"{_MLP}norm",
    "layers.{n}.mlp.gate.layer_0": f"{_MLP}fc1",
    "layers.{n}.mlp.gate.layer_1": f"{_MLP}fc2",
    "layers.{n}.mlp.gate.weight": f"{_MLP}out_proj.weight",
    "layers.{n}.mlp.gate.correction_bias": ".balancing_biases",
}


def zaya(config: Fields) -> DecoderSpec:
    for key in LEGACY:
        if config.has(key):
            raise config.error(key, "no such key: the older layout of ZAYA1 is not implemented")
    sizes = common.read_sizes(
        config, eps=1e-5, context=131072, kv_heads=2, head_dim=128, width=0, tied=True
    )
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), [FULL] * sizes.layers)
    mixers = {kind: _attention(config, sizes, kind) for kind in dict.fromkeys(types)}
    first, later = (_moe(config, sizes, reads) for reads in ("", STATE))
    norm = Norm(sizes.hidden, sizes.eps)
    layers = [
        Layer(
            (
                Branch("attention", mixers[kind], norm, learned_sum=True),
                Branch("mlp", later if number else first, norm, learned_sum=True),
            )
        )
        for number, kind in enumerate(types)
    ]
    return replace(
        common.decoder(sizes, layers, carried=(STATE,)),
        head_bias=config.bool("lm_head_bias", False),
        learned_embedding=True,
        residual_dtype="float32",
    )


def _attention(config: Fields, sizes: common.Sizes, kind: str) -> ConvolvedAttention:
    usual = {"rope_theta": THETAS[kind], "partial_rotary_factor": 0.5}
    given = config.has("rope_parameters")
    source = ropes.rope_of_type(config, kind) if given else Fields(usual)
    if source is None:
        raise config.error("rope_parameters", f"an object with {kind}")
    bias = config.bool("attention_bias", False)
    return ConvolvedAttention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        ropes.read_rope(config, sizes.head_dim, sizes.context, source=source),
        channel_kernel=config.int("cca_time0", 1, 64, 2),
        head_kernel=config.int("cca_time1", 1, 64, 2),
        window=config.int("sliding_window", 1, ropes.FAR) if kind == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
    )


def _moe(config: Fields, sizes: common.Sizes, reads: str) -> MoE:
    """One of the experts, or none: by score + bias, over one class more than there are experts."""
    policy = RouterPolicy(
        config.int("num_experts_per_tok", 1, 1, 1), score_dtype="model", correction_bias="score"
    )
    wiring = RouterWiring(
        config.int(("num_experts", "num_local_experts"), 1, common.COUNT, 16),
        num_null_experts=1,
        null_expert_kind="skip",
        router_input="carried_mlp",
    )
    width = config.int("router_hidden_size", 1, common.SIZE, 256)
    network = GateNetwork(width, Norm(width, sizes.eps), 2, "gelu", reads, STATE)
    experts = common.experts(config, config.int("moe_intermediate_size", 1, common.SIZE, 2048))
    return MoE(sizes.hidden, RouterSpec(policy, wiring), experts, gate_network=network)


FAMILIES = {
    "zaya": Family(
        "ZAYA1", zaya, NAMES, "softmax, biased choice, not renormalised, one class skips"
    ),
}
