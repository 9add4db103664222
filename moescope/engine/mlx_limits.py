"""Which fields of a `DecoderSpec` the MLX interpreter honours, and how others are refused.

The other way round than `limits`: a field that is not named here must keep its default, so that
what is new in a spec is refused until it is done here too. And which packed weights stay as they
are. Imports no mlx.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moescope.engine.decoder import (
    MLP,
    Attention,
    Branch,
    DecoderSpec,
    Experts,
    Layer,
    MoE,
    Norm,
    Pass,
    Rope,
    RopeScaling,
)
from moescope.engine.families import forms
from moescope.engine.families.places import Piece, Placement
from moescope.engine.limits import Limits
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

OPERATORS: tuple[type, ...] = (Attention, MLP, MoE, Pass)

HONOURED: dict[type, str] = {
    DecoderSpec: "vocab_size hidden context layers final_norm tied_head head_bias embedding_scale "
    "logit_scale logit_softcap carried",
    Layer: "branches learned_scale",
    Branch: "name operator pre_norm post_norm multiplier reads adds_to",
    Norm: "width eps kind weight bias applies",
    Rope: "theta dims style scaling applies sections",
    RopeScaling: "kind factor original_context attention_factor beta_fast beta_slow truncate "
    "low_freq_factor high_freq_factor short_factor long_factor short_mscale long_mscale "
    "rotated_dims",
    Attention: "hidden heads kv_heads head_dim scale rope window chunk v_head_dim qkv_bias "
    "out_bias qk_norm kv_norm qk_norm_over qk_norm_after_rope v_norm clip_qkv sinks softcap gate "
    "keys_are_values value_scale temperature_scale temperature_floor",
    MLP: "hidden width activation glu bias limit limit_site alpha up_shift",
    Experts: "width activation glu bias limit limit_site alpha up_shift hidden",
    MoE: "hidden router experts shared output_bias router_norm sums_in_float32",
    Pass: "",
    RouterSpec: "policy wiring",
    RouterPolicy: " ".join(f.name for f in fields(RouterPolicy)),  # all are the kernel's
    RouterWiring: "num_experts num_null_experts null_expert_kind router_dtype gate_bias "
    "shared_experts shared_expert_gate apply_router_weight_on_input combine_dtype moe_latent_size",
}
_VALUES: dict[type, dict[str, tuple[Any, ...]]] = {
    RouterWiring: {
        "router_input": ("normed", "residual", "residual_rms_scaled"),
        "shared_combination": ("add", "average"),
    },
}

# Formats that MLX multiplies as they are published -> its name for them.
KEPT = {
    "mlx affine": "affine",
    "mlx mxfp4": "mxfp4",
    "mlx mxfp8": "mxfp8",
    "mlx nvfp4": "nvfp4",
}


def _only(kind: type, honoured: str) -> dict[str, tuple[Any, ...]]:
    names = honoured.split()
    others = {f.name: () for f in fields(kind) if f.name not in names}
    return {**others, **_VALUES.get(kind, {})}


MLX = Limits(OPERATORS, {kind: _only(kind, names) for kind, names in HONOURED.items()})


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
