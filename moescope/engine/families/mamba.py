"""State-space hybrids: Nemotron-H, Granite 4 and Jamba.

Sources: arXiv 2504.03624, 2403.19887; transformers `modeling_nemotron_h.py`,
`modeling_granitemoehybrid.py`, `modeling_jamba.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common
from moescope.engine.families.deepseek import MASK_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import (
    MLP,
    Activation,
    Attention,
    Experts,
    MoE,
    Norm,
    Operator,
    StateSpace,
)
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

LINEAR, FULL, SPARSE, DENSE = "linear_attention", "full_attention", "moe", "mlp"
# What older configs call the types of layers, and the letters of `hybrid_override_pattern`.
_TYPES = {"mamba": LINEAR, "attention": FULL, "M": LINEAR, "*": FULL, "E": SPARSE, "-": DENSE}
ENDLESS = float("inf")

# --- Nemotron-H: one mixer a layer ---------------------------------------------------------------

NEMOTRON_NAMES: Names = {
    "embed": ("model.embeddings", "backbone.embeddings"),
    "final_norm": ("model.norm_f", "backbone.norm_f"),
    "head": "lm_head",
    "layers.{n}": ("model.layers.{n}", "backbone.layers.{n}"),
    **{f"layers.{{n}}.{name}": ".mixer" for name in ("ssm", "attention", "mlp")},
    **{f"layers.{{n}}.{name}.pre_norm": "..norm" for name in ("ssm", "attention", "mlp")},
    "layers.{n}.mlp.latent_down": ".fc1_latent_proj",
    "layers.{n}.mlp.latent_up": ".fc2_latent_proj",
    "unread": ("mtp.*",),
}


def nemotron_h(config: Fields) -> DecoderSpec:
    """Experts without a gate, optionally in a narrower space; attention without positions."""
    types = _nemotron_types(config)
    sizes = common.read_sizes(
        config,
        eps=1e-5,
        context=4096,
        kv_heads=8,
        head_dim=128,
        width=21504,
        layers=len(types),
        eps_key="layer_norm_epsilon",
    )
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    mixers: dict[str, tuple[str, Operator]] = {
        LINEAR: ("ssm", _nemotron_ssm(config, sizes)),
        FULL: ("attention", _unrotated(sizes)),
        SPARSE: ("mlp", _nemotron_moe(config, sizes)),
        DENSE: ("mlp", _nemotron_mlp(config, sizes, sizes.width)),
    }
    layers = [Layer((Branch(*mixers[kind], norm),)) for kind in types]
    return common.decoder(sizes, layers, final_norm=norm)


def _nemotron_types(config: Fields) -> list[str]:
    pattern = config.str("hybrid_override_pattern", default="")
    types = config.list(("layers_block_type", "layer_types"), str, default=None)
    types = [_TYPES.get(kind, kind) for kind in (list(pattern) if types is None else types)]
    if unknown := set(types) - {LINEAR, FULL, SPARSE, DENSE} or not types:
        named = "layers_block_type" if config.has("layers_block_type") else "layer_types"
        found = f", not {sorted(unknown)[0]}" if isinstance(unknown, set) else ""
        raise config.error(named, f"{LINEAR}, {FULL}, {SPARSE} or {DENSE} for each layer{found}")
    return types


def _nemotron_ssm(config: Fields, sizes: common.Sizes) -> StateSpace:
    heads = config.int("mamba_num_heads", 1, common.COUNT, 128)
    head_dim = config.int("mamba_head_dim", 1, common.COUNT, 64)
    groups = config.int(("n_groups", "mamba_n_groups"), 1, common.COUNT, 8)
    config.str("mamba_hidden_act", ("silu", "swish"), default="silu")
    inner = heads * head_dim
    return StateSpace(
        sizes.hidden,
        "mamba2",
        inner,
        config.int("ssm_state_size", 1, common.COUNT, 128),
        config.int(("conv_kernel", "mamba_d_conv"), 2, 64, 4),
        heads,
        head_dim,
        _groups(config, groups, heads),
        conv_bias=config.bool(("use_conv_bias", "mamba_conv_bias"), True),
        bias=config.bool("use_bias", False),
        gated_norm=Norm(inner, sizes.eps),
        dt_floor=config.float(("time_step_min", "mamba_dt_min"), 0.0, 1e6, 0.001),
    )


def _groups(config: Fields, groups: int, heads: int) -> int:
    if heads % groups:
        raise config.error(("n_groups", "mamba_n_groups"), f"a divisor of {heads} heads")
    return groups


def _nemotron_moe(config: Fields, sizes: common.Sizes) -> MoE:
    latent = config.int("moe_latent_size", 1, common.SIZE, 0)
    if latent and config.bool("mlp_bias", False):
        raise config.error("mlp_bias", "false where experts have a moe_latent_size")
    router = biased.read_router(config, biased.Usual()).with_wiring(moe_latent_size=latent)
    width = config.int("moe_intermediate_size", 1, common.SIZE, 7688)
    shared = config.int("moe_shared_expert_intermediate_size", 1, common.SIZE, 7688)
    experts = Experts(width, _relu2(config), glu=False, hidden=latent)
    return MoE(sizes.hidden, router, experts, _nemotron_mlp(config, sizes, shared))


def _nemotron_mlp(config: Fields, sizes: common.Sizes, width: int) -> MLP:
    bias = config.bool("mlp_bias", False)
    return MLP(sizes.hidden, width, _relu2(config), glu=False, bias=bias)


def _relu2(config: Fields) -> Activation:
    config.str("mlp_hidden_act", ("relu2",), default="relu2")
    return "relu2"


def _unrotated(sizes: common.Sizes, *, bias: bool = False, scale: float | None = None) -> Attention:
    return Attention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5 if scale is None else scale,
        qkv_bias=bias,
        out_bias=bias,
    )


# --- Granite 4 -----------------------------------------------------------------------------------

GRANITE_NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.ssm": ".mamba",
    "layers.{n}.ssm.pre_norm": "..input_layernorm",
    "layers.{n}.mlp": ".block_sparse_moe",
    "layers.{n}.mlp.shared_expert": "..shared_mlp",
}


def granite_hybrid(config: Fields) -> DecoderSpec:
    """Multipliers of Granite; a shared block beside the experts in every layer."""
    sizes = common.read_sizes(config, eps=1e-6, context=2048, width=11008)
    norm, multiplier = (
        Norm(sizes.hidden, sizes.eps),
        config.float("residual_multiplier", default=1.0),
    )
    mixers: dict[str, tuple[str, Operator]] = {
        LINEAR: ("ssm", _granite_ssm(config, sizes)),
        FULL: ("attention", _granite_attention(config, sizes)),
    }
    types = config.list(("layer_types", "layers_block_type"), str, sizes.layers, default=None)
    types = [_TYPES.get(kind, kind) for kind in types or [LINEAR] * sizes.layers]
    if unknown := set(types) - set(mixers):
        raise config.error("layer_types", f"{LINEAR} or {FULL}, not {sorted(unknown)[0]}")
    moe = Branch("mlp", _granite_moe(config, sizes), norm, multiplier=multiplier)
    layers = [Layer((Branch(*mixers[kind], norm, multiplier=multiplier), moe)) for kind in types]
    scale = config.float("logits_scaling", 1e-6, 1e6, 1.0)
    spec = common.decoder(sizes, layers)
    embedding = config.float("embedding_multiplier", default=1.0)
    return replace(spec, embedding_scale=embedding, logit_scale=1.0 / scale)


def _granite_attention(config: Fields, sizes: common.Sizes) -> Attention:
    kind = config.str("position_embedding_type", ("rope", "nope"), default="nope")
    scale = config.float("attention_multiplier", default=1.0)
    plain = _unrotated(sizes, bias=config.bool("attention_bias", False), scale=scale)
    return replace(plain, rope=common.read_rope(config, sizes)) if kind == "rope" else plain


def _granite_ssm(config: Fields, sizes: common.Sizes) -> StateSpace:
    inner = config.int("mamba_expand", 1, 64, 2) * sizes.hidden
    heads = config.int("mamba_n_heads", 1, common.COUNT, 128)
    if inner % heads:
        raise config.error("mamba_n_heads", f"a divisor of the inner width {inner}")
    if config.raw("mamba_d_head") not in (None, "auto", inner // heads):
        raise config.error("mamba_d_head", f"{inner // heads} or auto")
    low, high = config.list("time_step_limit", float, 2, default=[0.0, ENDLESS])
    return StateSpace(
        sizes.hidden,
        "mamba2",
        inner,
        config.int("mamba_d_state", 1, common.COUNT, 256),
        config.int("mamba_d_conv", 2, 64, 4),
        heads,
        inner // heads,
        _groups(config, config.int("mamba_n_groups", 1, common.COUNT, 1), heads),
        conv_bias=config.bool("mamba_conv_bias", True),
        bias=config.bool("mamba_proj_bias", False),
        gated_norm=Norm(inner, sizes.eps),
        dt_floor=float(low),
        dt_ceiling=float(high),
    )


def _granite_moe(config: Fields, sizes: common.Sizes) -> MoE:
    experts, chosen = biased.read_counts(config)
    router = RouterSpec(
        RouterPolicy(chosen, score_order="topk_then_score"),
        RouterWiring(experts, shared_experts=1),
    )
    width = config.int("shared_intermediate_size", 1, common.SIZE, 1024)
    shared = MLP(sizes.hidden, width, common.read_activation(config))
    return MoE(sizes.hidden, router, common.experts(config, sizes.width), shared)


# --- Jamba ---------------------------------------------------------------------------------------

JAMBA_NAMES: Names = {
    **PRE_NORM_NAMES,
    "final_norm": "model.final_layernorm",
    "layers.{n}.ssm": ".mamba",
    "layers.{n}.ssm.pre_norm": "..input_layernorm",
    **{f"layers.{{n}}.ssm.{n}_norm": f".{n}_layernorm" for n in ("dt", "b", "c")},
    "layers.{n}.mlp": ".feed_forward",
    "layers.{n}.mlp.pre_norm": "..pre_ff_layernorm",
}


def jamba(config: Fields) -> DecoderSpec:
    """Never renormalised; experts in every second layer, attention in every eighth."""
    sizes = common.read_sizes(config, eps=1e-6, context=262144, kv_heads=8)
    norm = Norm(sizes.hidden, sizes.eps)
    mixers: dict[bool, tuple[str, Operator]] = {
        False: ("ssm", _jamba_ssm(config, sizes)),
        True: ("attention", _unrotated(sizes)),
    }
    router = common.softmax_router(config, renormalises=False)
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    dense = MLP(sizes.hidden, sizes.width, common.read_activation(config))
    attends, routes = _every(config, "attn_layer", 8, 4), _every(config, "expert_layer", 2, 1)
    layers = [
        Layer(
            (
                Branch(*mixers[number % attends[0] == attends[1]], norm),
                Branch("mlp", moe if number % routes[0] == routes[1] else dense, norm),
            )
        )
        for number in range(sizes.layers)
    ]
    return common.decoder(sizes, layers)


def _every(config: Fields, name: str, period: int, offset: int) -> tuple[int, int]:
    period = config.int(f"{name}_period", 1, 1024, period)
    return period, config.int(f"{name}_offset", 0, period - 1, min(offset, period - 1))


def _jamba_ssm(config: Fields, sizes: common.Sizes) -> StateSpace:
    usual = math.ceil(sizes.hidden / 16)
    automatic = config.raw("mamba_dt_rank") == "auto"
    return StateSpace(
        sizes.hidden,
        "mamba1",
        config.int("mamba_expand", 1, 64, 2) * sizes.hidden,
        config.int("mamba_d_state", 1, common.COUNT, 16),
        config.int("mamba_d_conv", 2, 64, 4),
        dt_rank=usual if automatic else config.int("mamba_dt_rank", 1, common.SIZE, usual),
        conv_bias=config.bool("mamba_conv_bias", True),
        bias=config.bool("mamba_proj_bias", False),
        inner_norms=Norm(usual, sizes.eps),
    )


_STEP_NOTE = (
    "time steps below time_step_min are raised to it, as transformers does; mlx-lm follows "
    "time_step_limit, and logits differ by some thousandths"
)
FAMILIES = {
    "nemotron_h": Family(
        "Nemotron-H",
        nemotron_h,
        NEMOTRON_NAMES,
        "renormalised sigmoid, biased choice, experts without a gate",
        notes=(MASK_NOTE, _STEP_NOTE),
    ),
    "granitemoehybrid": Family(
        "Granite 4",
        granite_hybrid,
        GRANITE_NAMES,
        "softmax over the selected, shared block",
        {"moe_intermediate_size": "intermediate_size"},
    ),
    "jamba": Family(
        "Jamba",
        jamba,
        JAMBA_NAMES,
        "not renormalised",
        {"moe_intermediate_size": "intermediate_size"},
        notes=("mlx-lm renormalises the weights of this family; transformers does not",),
    ),
}
