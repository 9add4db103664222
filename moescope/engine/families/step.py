"""Step-3.5 and the text of Step-3.7: more heads where attention slides, a gate on each head, and
activations that some layers clamp.

Source: transformers `modeling_step3p7.py`. Published configs keep lists with an entry for each
layer, and further entries for layers that predict ahead, which are not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from moescope.engine.config import Fields, shown
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family, NoteIf
from moescope.engine.families.forms import In
from moescope.engine.families.layouts import FUSED, STACKED, SWITCH_MLP
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, Experts, MoE, Norm, Rope
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

_ZERO_CENTRED = ("attention.pre_norm", "mlp.pre_norm", "attention.q_norm", "attention.k_norm")
_PLACES = ("..input_layernorm", "..post_attention_layernorm", ".q_norm", ".k_norm")
NAMES: Names = {
    **PRE_NORM_NAMES,
    "final_norm": In("model.norm", mlx="plus one"),
    "layers.{n}.mlp": (".mlp", ".moe"),
    **{
        f"layers.{{n}}.{ours}": In(theirs, mlx="plus one")
        for ours, theirs in zip(_ZERO_CENTRED, _PLACES, strict=True)
    },
    "layers.{n}.mlp.gate": (".gate", ".gate.gate"),
    "layers.{n}.mlp.gate.correction_bias": (
        "..router_bias",
        ".router_bias",
        ".e_score_correction_bias",
    ),
    "layers.{n}.mlp.experts": (STACKED, FUSED, SWITCH_MLP),
    "layers.{n}.mlp.shared_expert": ("..share_expert", ".share_expert", ".shared_experts"),
}
_SAME = {
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
    "num_mtp_layers": "num_nextn_predict_layers",
}
_BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)
# What published configs say, and another value of which is not implemented.
_WORDS = {"moe_router_activation": "sigmoid", "att_impl_type": "GQA", "hidden_act": "silu"}
_FLAGS = {
    "use_moe": True,
    "use_moe_router_bias": True,
    "norm_expert_weight": True,
    "use_qk_norm": True,
    "zero_centered": True,
    "use_head_wise_attn_gate": True,
    "sink": False,
    "use_bidirectional_attention": False,
}


def step(config: Fields) -> DecoderSpec:
    config = _trimmed(config.renamed(_SAME))
    _refuse_others(config)
    sizes = common.read_sizes(
        config, eps=1e-5, context=128000, kv_heads=8, head_dim=128, width=11264
    )
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), [FULL] * sizes.layers)
    kinds = {kind: _attention(config, sizes, kind, types) for kind in dict.fromkeys(types)}
    mixers = [
        replace(kinds[kind], heads=heads)
        for kind, heads in zip(types, _heads(config, sizes, types), strict=True)
    ]
    norm = _norm(sizes, sizes.hidden)
    layers = [
        common.pre_norm_layer(sizes, mixer, block, norm=norm)
        for mixer, block in zip(mixers, _blocks(config, sizes), strict=True)
    ]
    return common.decoder(sizes, layers, final_norm=norm)


def _trimmed(config: Fields) -> Fields:
    """Without the entries of layers that predict ahead."""
    layers = config.int("num_hidden_layers", 1, 1024)
    whole = layers + config.int("num_nextn_predict_layers", 0, 1024, 0)

    def of(name: str, value: Any) -> Any:
        padded = name in _BY_LAYER and isinstance(value, list) and len(value) == whole
        return value[:layers] if padded else value

    values = {name: of(name, value) for name, value in config.values.items()}
    return Fields(values, config.file, config.prefix)


def _refuse_others(config: Fields) -> None:
    for name, word in _WORDS.items():
        config.str(name, (word,), default=word)
    for name, flag in _FLAGS.items():
        if config.bool(name, flag) is not flag:
            raise config.error(name, str(flag).lower())
    if not all(config.list("use_rope_layers", bool, default=[])):
        raise config.error("use_rope_layers", "true for every layer")


def _norm(sizes: common.Sizes, width: int) -> Norm:
    return Norm(width, sizes.eps, "rms_zero_centred", applies="float32")


def _attention(config: Fields, sizes: common.Sizes, kind: str, types: Sequence[str]) -> Attention:
    bias = config.bool("attention_bias", False)
    per_head = float(sizes.head_dim)
    return Attention(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        config.float("query_pre_attn_scalar", 1e-6, 1e6, per_head) ** -0.5,
        _rope(config, sizes, kind, types),
        window=config.int("sliding_window", 1, ropes.FAR) if kind == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=_norm(sizes, sizes.head_dim),
        gate="sigmoid_per_head",
    )


def _heads(config: Fields, sizes: common.Sizes, types: Sequence[str]) -> list[int]:
    """Of every layer: by `per_layer_config`, else another count for those that slide."""
    other = config.fields("attention_other_setting") or Fields({})
    other.str("attention_type", (SLIDING,), default=SLIDING)
    for name, size in (("num_attention_groups", sizes.kv_heads), ("head_dim", sizes.head_dim)):
        if other.int(name, 1, common.SIZE, size) != size:
            raise other.error(name, f"that of all layers, {size}")
    wide = other.int("num_attention_heads", 1, common.COUNT, sizes.heads)
    wide = config.int("num_sliding_attention_heads", 1, common.COUNT, wide)
    heads = [wide if kind == SLIDING else sizes.heads for kind in types]
    if (every := config.fields("per_layer_config")) is not None:
        own = [every.fields(str(number)) or Fields({}) for number in range(sizes.layers)]
        if unknown := {name for one in own for name in one.values} - {"num_attention_heads"}:
            raise config.error("per_layer_config", f"no {sorted(unknown)[0]}: not implemented")
        heads = [one.int("num_attention_heads", 1, common.COUNT, sizes.heads) for one in own]
    if any(count % sizes.kv_heads for count in heads):
        raise config.error("num_key_value_heads", f"a divisor of {sorted(set(heads))} heads")
    return heads


def _rope(config: Fields, sizes: common.Sizes, kind: str, types: Sequence[str]) -> Rope:
    source = ropes.rope_of_type(config, kind)
    if source is None:
        if config.has("rope_parameters") and not config.has("rope_scaling"):
            raise config.error("rope_parameters", f"an object for {kind}")
        config.raw(("rope_parameters", "rope_scaling"))
        stretched = config.fields("rope_scaling") if kind == FULL else None
        if stretched is not None and config.list("yarn_only_types", str, default=[FULL]) != [FULL]:
            raise config.error("yarn_only_types", FULL)
        values = {
            "rope_theta": _of_type(config, "rope_theta", types, kind, 10000.0),
            "partial_rotary_factor": _of_type(config, "partial_rotary_factors", types, kind, 1.0),
            **(stretched.values if stretched else {}),
        }
        source = Fields(values, config.file, f"{config.prefix}rope_scaling.")
    return ropes.read_rope(config, sizes.head_dim, sizes.context, source=source)


def _of_type(config: Fields, name: str, types: Sequence[str], kind: str, usual: float) -> float:
    """A number for all layers, or that on which the layers of one type agree in a list."""
    if not isinstance(config.raw(name), list):
        return config.float(name, 0.0, 1e15, usual)
    numbers = config.list(name, float, len(types))
    found = {number for number, each in zip(numbers, types, strict=True) if each == kind}
    if len(found) != 1:
        raise config.error(name, f"one number for all layers of {kind}")
    return float(found.pop())


def _blocks(config: Fields, sizes: common.Sizes) -> list[MoE | MLP]:
    width = config.int("moe_intermediate_size", 1, common.SIZE, 1280)
    shared = config.int("share_expert_dim", 1, common.SIZE, 1280)
    bias, router = config.bool("mlp_bias", False), _router(config)

    def mlp(rows: int, limit: float) -> MLP:
        return MLP(sizes.hidden, rows, bias=bias, limit=limit, limit_site=_site(limit))

    def block(sparse: bool, limit: float, limit_shared: float) -> MoE | MLP:
        if not sparse:
            return mlp(sizes.width, limit_shared)
        experts = Experts(width, limit=limit, limit_site=_site(limit))
        return MoE(sizes.hidden, router, experts, mlp(shared, limit_shared))

    limits = [
        _limits(config, name, sizes.layers) for name in ("swiglu_limits", "swiglu_limits_shared")
    ]
    return [block(*of) for of in zip(_sparse(config, sizes.layers), *limits, strict=True)]


def _site(limit: float) -> Literal["before", "after"]:
    return "after" if limit else "before"


def _limits(config: Fields, name: str, layers: int) -> list[float]:
    """Of every layer; null and 0 clamp nothing."""
    given = config.raw(name)
    if given is None or given == []:
        return [0.0] * layers
    numbers = [0 if each is None else each for each in given] if isinstance(given, list) else given
    limits = Fields({name: numbers}, config.file, config.prefix).list(name, float, layers)
    if not all(0 <= limit <= 1e6 for limit in limits):
        raise config.error(name, "numbers 0..1e6")
    return [float(limit) for limit in limits]


def _sparse(config: Fields, layers: int) -> list[bool]:
    """`moe_layers_enum` lists layers, mostly as one text with commas."""
    if config.has("mlp_layer_types") or not config.has("moe_layers_enum"):
        return biased.typed_layers(config, layers, [number >= 3 for number in range(layers)])
    listed = config.raw("moe_layers_enum")
    words = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(words, list):
        raise config.error("moe_layers_enum", "a list of layers")
    numbers = {str(word).strip() for word in words}
    if unknown := sorted(numbers - set(map(str, range(1024))) - {""}):
        raise config.error("moe_layers_enum", f"numbers of layers, not {shown(unknown[0])}")
    return [str(number) in numbers for number in range(layers)]


def _router(config: Fields) -> RouterSpec:
    experts, chosen = biased.read_counts(config, 8)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        correction_bias="score",
        norm_topk_prob=True,
        routed_scaling_factor=config.float("moe_router_scaling_factor", 0.0, 1e6, 1.0),
        scale_site="routed_output",
    )
    wiring = RouterWiring(experts, shared_experts=1, combine_dtype="float32")
    if config.bool("need_fp32_gate", False):
        wiring = replace(wiring, router_dtype="float32")
    return RouterSpec(policy, wiring)


_SITE = (
    "moe_router_scaling_factor is on the experts' sum, as in transformers; mlx-lm has it in the "
    "weights, so weights recorded there differ by the factor"
)
_GATE = NoteIf(
    "the gate's product is in float32, as need_fp32_gate asks; transformers and mlx-lm take it in "
    "the model's dtype, so in bfloat16 near ties may fall otherwise there",
    lambda config: config.bool("need_fp32_gate", False),
)
FAMILIES = {
    "step3p5": Family(
        "Step-3.5, Step-3.7",
        step,
        NAMES,
        "sigmoid, biased choice, renormalised; the sum scaled",
        {"num_experts": "moe_num_experts", "shared_expert_intermediate_size": "share_expert_dim"},
        notes=(_SITE, _GATE),
    ),
}
