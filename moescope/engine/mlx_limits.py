"""Which fields of a `DecoderSpec` the MLX interpreter honours, and how others are refused.

The other way round than `limits`: a field that is not named here must keep its default, so that
what is new in a spec is refused until it is done here too. And which packed weights stay as they
are. Imports no mlx.
"""

from __future__ import annotations

from dataclasses import fields

from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import forms
from moescope.engine.families.plans import Piece, Placement
from moescope.engine.limits import honouring
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    Experts,
    GateNetwork,
    Indexer,
    LinearAttention,
    MoE,
    Norm,
    Pass,
    Rope,
    RopeScaling,
    RoutedAttention,
    ShortConv,
    StateSpace,
)
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

OPERATORS: tuple[type, ...] = (
    Attention,
    ConvolvedAttention,
    LinearAttention,
    MLA,
    MLP,
    MoE,
    Pass,
    RoutedAttention,
    ShortConv,
    StateSpace,
)

HONOURED: dict[type, str] = {
    DecoderSpec: "vocab_size hidden context layers final_norm tied_head head_bias norm_head "
    "embedding_scale learned_embedding residual_dtype logit_scale logit_softcap carried",
    Layer: "branches learned_scale",
    Branch: "name operator pre_norm post_norm multiplier reads adds_to keeps learned_sum",
    Norm: "width eps kind weight bias applies gate_rank",
    Rope: "theta dims style scaling applies sections",
    RopeScaling: "kind factor original_context attention_factor beta_fast beta_slow truncate "
    "low_freq_factor high_freq_factor short_factor long_factor short_mscale long_mscale "
    "rotated_dims",
    Attention: "hidden heads kv_heads head_dim scale rope window chunk v_head_dim qkv_bias "
    "out_bias qk_norm kv_norm qk_norm_over qk_norm_after_rope v_norm clip_qkv sinks softcap gate "
    "keys_are_values value_scale temperature_scale temperature_floor temperature_kind gate_bias "
    "float32_scores",
    ConvolvedAttention: "hidden heads kv_heads head_dim scale rope channel_kernel head_kernel "
    "window qkv_bias out_bias",
    LinearAttention: "hidden kind key_heads value_heads key_dim value_dim conv_kernel out_norm "
    "out_gate gate_rank decay_floor",
    MLA: "hidden heads kv_lora_rank nope_dim rope_dim v_dim scale rope q_lora_rank latent_norm "
    "q_latent_norm q_latent_scale kv_latent_scale bias q_reads_raw gate temperature_scale "
    "temperature_floor indexer shares_choice",
    Indexer: "heads head_dim topk rope norm",
    MLP: "hidden width activation glu bias limit limit_site alpha up_shift",
    Experts: "width activation glu bias limit limit_site alpha up_shift hidden",
    MoE: "hidden router experts shared output_bias router_norm sums_in_float32 gate_network",
    GateNetwork: "width norm layers activation reads writes",
    Pass: "",
    RoutedAttention: "hidden router kv_heads head_dim scale rope output_bias",
    ShortConv: "hidden kernel bias",
    StateSpace: "hidden kind inner state_size conv_kernel heads head_dim groups dt_rank conv_bias "
    "bias inner_norms gated_norm dt_floor dt_ceiling",
    RouterSpec: "policy wiring",
    RouterPolicy: " ".join(f.name for f in fields(RouterPolicy)),  # all are the kernel's
    RouterWiring: "num_experts num_null_experts null_expert_kind router_input router_dtype "
    "gate_bias shared_experts shared_expert_gate shared_combination apply_router_weight_on_input "
    "combine_dtype moe_latent_size",
}
# Of honoured fields that hold a word, the words: others may come to be.
WORDS: dict[tuple[type, str], str] = {
    (DecoderSpec, "residual_dtype"): "model float32",
    (Norm, "kind"): "rms rms_zero_centred layer l2",
    (Norm, "applies"): "model float32",
    (Rope, "style"): "half interleaved",
    (Rope, "applies"): "model float32",
    (RopeScaling, "kind"): "linear yarn llama3 longrope proportional alpha",
    (Attention, "qk_norm_over"): "flat per_head",
    (Attention, "gate"): "none in_q_proj sigmoid softplus sigmoid_per_head softplus_per_head",
    (Attention, "temperature_kind"): "log power",
    (LinearAttention, "kind"): "gated_delta kda",
    (LinearAttention, "out_gate"): "silu sigmoid",
    (MLA, "gate"): "none in_q_proj sigmoid_per_head",
    (MLP, "activation"): "silu gelu gelu_tanh relu2 swiglu_oai",
    (MLP, "limit_site"): "before after",
    (Experts, "activation"): "silu gelu gelu_tanh relu2 swiglu_oai",
    (Experts, "limit_site"): "before after",
    (GateNetwork, "activation"): "silu gelu gelu_tanh relu2",
    (StateSpace, "kind"): "mamba1 mamba2",
    (RouterWiring, "null_expert_kind"): "none identity skip",
    (RouterWiring, "router_input"): "normed residual residual_rms_scaled carried_mlp",
    (RouterWiring, "router_dtype"): "model float32 bfloat16 float16",
    (RouterWiring, "shared_expert_gate"): "none sigmoid",
    (RouterWiring, "shared_combination"): "add average",
    (RouterWiring, "combine_dtype"): "model float32 bfloat16 float16",
}

# Formats that MLX multiplies as they are published -> its name for them.
KEPT = {
    "mlx affine": "affine",
    "mlx mxfp4": "mxfp4",
    "mlx mxfp8": "mxfp8",
    "mlx nvfp4": "nvfp4",
    "MXFP4": "mxfp4",  # gpt-oss: the same bytes
}


MLX = honouring(OPERATORS, HONOURED, WORDS)


def refuse_unsupported(spec: DecoderSpec) -> None:
    """Raise a MoescopeError for the first thing that the MLX interpreter does not do."""
    if (found := MLX.first(spec)) is not None:
        name, value = found
        raise MoescopeError(
            f"{name} {value}: not implemented by the MLX interpreter of this version",
            hint="--device cpu",
            code=ExitCode.CHECKPOINT,
        )


def stays_packed(placement: Placement) -> bool:
    """Whether MLX multiplies a tensor of ours as it is published: all of it packed by formats of
    MLX's own, in rows of ours or a permutation of them."""
    return bool(placement.pieces) and all(map(_is_kept, placement.pieces))


def _is_kept(piece: Piece) -> bool:
    form = forms.FORMS[piece.form]
    if piece.packed is None or form.transposed or form.folded or form.minus:
        return False
    roles = dict(piece.packed.tensors)  # a scale of the whole matrix is not MLX's everywhere
    return piece.packed.format in KEPT and "global_scale" not in roles
