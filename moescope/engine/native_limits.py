"""What the C decode step covers of a `DecoderSpec`, operator by operator.

A field that is not named here must keep its default, so that nothing new in a spec is overlooked:
an operator that asks for more runs as its torch operator between two parts of the C program, and a
decoder whose branches or head ask for more does not run in C at all. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.limits import honouring
from moescope.engine.operators import MLA, MLP, Attention, Experts, MoE, Norm, Operator, Pass, Rope
from moescope.kernels.spec import RouterSpec, RouterWiring

if TYPE_CHECKING:
    from moescope.engine.steps import Shared

MOST_EXPERTS, MOST_PICKS = 4096, 64  # of `router.h`
_OPERATORS: tuple[type, ...] = (Attention, MLA, MLP, MoE, Pass)
_HONOURED: dict[type, str] = {
    DecoderSpec: "vocab_size hidden context layers final_norm tied_head head_bias norm_head "
    "embedding_scale learned_embedding residual_dtype logit_scale logit_softcap carried",
    Layer: "branches learned_scale",
    Branch: "name operator pre_norm post_norm multiplier reads adds_to keeps learned_sum",
    Norm: "width eps kind weight bias applies gate_rank",
    Rope: "theta dims style scaling applies sections",  # tables come from the torch decoder
    Attention: "hidden heads kv_heads head_dim scale rope window chunk v_head_dim qkv_bias "
    "out_bias qk_norm kv_norm qk_norm_over qk_norm_after_rope v_norm clip_qkv sinks softcap gate "
    "keys_are_values value_scale temperature_scale temperature_floor temperature_kind gate_bias "
    "float32_scores",
    MLA: "hidden heads kv_lora_rank nope_dim rope_dim v_dim scale rope q_lora_rank latent_norm "
    "q_latent_norm q_latent_scale kv_latent_scale bias q_reads_raw gate temperature_scale "
    "temperature_floor",
    MLP: "hidden width activation glu bias limit limit_site alpha up_shift",
    Experts: "width activation glu bias limit limit_site alpha up_shift hidden",
    MoE: "hidden router experts shared output_bias router_norm sums_in_float32",
    Pass: "",
    RouterSpec: "policy wiring",
    RouterWiring: "num_experts num_null_experts null_expert_kind router_input router_dtype "
    "gate_bias shared_experts shared_expert_gate shared_combination apply_router_weight_on_input "
    "combine_dtype moe_latent_size",
}
# Of honoured fields that hold a word, the words: others may come to be.
_WORDS: dict[tuple[type, str], str] = {
    (DecoderSpec, "residual_dtype"): "model float32",
    (Norm, "kind"): "rms rms_zero_centred layer l2",
    (Norm, "applies"): "model float32",
    (Rope, "style"): "half interleaved",
    (Rope, "applies"): "model float32",
    (Attention, "qk_norm_over"): "flat per_head",
    (Attention, "gate"): "none in_q_proj sigmoid softplus sigmoid_per_head softplus_per_head",
    (Attention, "temperature_kind"): "log power",
    (MLA, "gate"): "none in_q_proj sigmoid_per_head",
    (MLP, "activation"): "silu gelu gelu_tanh relu2 swiglu_oai",
    (MLP, "limit_site"): "before after",
    (Experts, "activation"): "silu gelu gelu_tanh relu2 swiglu_oai",
    (Experts, "limit_site"): "before after",
    (RouterWiring, "null_expert_kind"): "none identity skip",
    (RouterWiring, "router_input"): "normed residual residual_rms_scaled",
    (RouterWiring, "router_dtype"): "model float32 bfloat16 float16",
    (RouterWiring, "shared_expert_gate"): "none sigmoid",
    (RouterWiring, "shared_combination"): "add average",
    (RouterWiring, "combine_dtype"): "model float32 bfloat16 float16",
}


NATIVE = honouring(_OPERATORS, _HONOURED, _WORDS)


def why_not_native(spec: DecoderSpec) -> str:
    """Why no part of a decoder runs in C, whatever its operators are; "" where parts do."""
    layers = tuple(
        replace(layer, branches=tuple(replace(b, operator=Pass()) for b in layer.branches))
        for layer in spec.layers
    )
    return _says(replace(spec, layers=layers))


def why_beside(shared: Shared, operator: Operator, router: int) -> str:
    """Why an operator runs in torch beside the C program; "" where it is part of that. `router` is
    the number of its router, if it has one."""
    if not isinstance(operator, _OPERATORS):
        return f"{type(operator).__name__}: no C form"
    if why := _says(operator):
        return why
    return _why_not_router(shared, router) if isinstance(operator, MoE) else ""


def _why_not_router(shared: Shared, router: int) -> str:
    spec = shared.routers[router].spec
    wiring = spec.wiring
    if wiring.router_dtype not in ("float32", shared.dtype):
        return f"router_dtype {wiring.router_dtype}: no C form in a {shared.dtype} model"
    if spec.E > MOST_EXPERTS or picks(shared, router) > MOST_PICKS:
        return f"num_experts {spec.E}, K {spec.K}: no C form"
    if wiring.moe_latent_size and wiring.null_expert_kind == "identity":
        return "moe_latent_size with null experts: no C form"
    return ""


def picks(shared: Shared, router: int) -> int:
    """Experts a lane can be made to pick."""
    from moescope.engine.steps import K_LIMIT

    spec = shared.routers[router].spec
    return max(spec.K, min(spec.E, K_LIMIT))


def _says(value: Any) -> str:
    found = NATIVE.first(value)
    return "" if found is None else f"{found[0]} {found[1]}: no C form"
