"""What the torch interpreter does not do yet, as a table of spec fields, and the refusal by name.

A field that is not in the table is honoured. Imports no torch.
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
    Rope,
    RopeScaling,
)
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterWiring

# Fields that must keep their default (or hold a value named here) for this interpreter.
_ONLY: dict[type, dict[str, tuple[Any, ...]]] = {
    DecoderSpec: {
        "head_bias": (),
        "embedding_scale": (),
        "logit_scale": (),
        "logit_softcap": (),
        "carried": (),
    },
    Norm: {"kind": (), "bias": (), "weight": ()},
    Layer: {"learned_scale": ()},
    Rope: {"style": (), "sections": ()},
    RopeScaling: {"kind": ("linear", "yarn")},
    Attention: {
        name: ()
        for name in (
            "chunk",
            "v_head_dim",
            "qk_norm_after_rope",
            "v_norm",
            "sinks",
            "softcap",
            "gate",
            "keys_are_values",
            "value_scale",
            "temperature_scale",
            "shares_kv_of",
        )
    },
    MLP: {"activation": (), "glu": (), "bias": (), "limit": ()},
    Experts: {
        "activation": (),
        "glu": (),
        "bias": (),
        "limit": (),
        "alpha": (),
        "up_shift": (),
        "hidden": (),
    },
    MoE: {"output_bias": ()},
    RouterPolicy: {"correction_bias": (), "per_expert_scale": ()},
    RouterWiring: {
        "router_input": ("normed", "residual"),
        "null_expert_kind": ("none", "skip"),
        "gate_bias": (),
        "hash_table": (),
        "shared_combination": (),
        "moe_latent_size": (),
        "expert_pre_norm": (),
        "expert_post_norm": (),
    },
}


def refuse_unsupported(value: Any) -> None:
    """Raise a MoescopeError for the first thing in a spec that this interpreter does not do."""
    only = _ONLY.get(type(value), {})
    if isinstance(value, Branch) and not isinstance(value.operator, Attention | MLP | MoE):
        raise _unsupported("Branch", "operator", type(value.operator).__name__)
    if isinstance(value, Attention) and value.rope and value.rope.dims != value.head_dim:
        raise _unsupported("Rope", "dims", value.rope.dims)
    for f in fields(value):
        held = getattr(value, f.name)
        if f.name in only and held != f.default and held not in only[f.name]:
            raise _unsupported(type(value).__name__, f.name, held)
        for item in held if isinstance(held, tuple) else (held,):
            if hasattr(item, "__dataclass_fields__"):
                refuse_unsupported(item)


def _unsupported(kind: str, name: str, found: Any) -> MoescopeError:
    return MoescopeError(
        f"{kind}.{name} {found}: not implemented by the torch interpreter of this version",
        code=ExitCode.CHECKPOINT,
    )
