"""Which fields of a `DecoderSpec` a program honours, as tables, and the first that it does not.

A field that is not in a table is honoured. Imports no torch: the tables say what the torch
interpreter runs, and what the fused decode steps cover of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    Experts,
    GateNetwork,
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
from moescope.kernels.spec import RouterPolicy, RouterWiring


@dataclass(frozen=True, slots=True)
class Limits:
    """`only`: fields that must keep their default, or hold a value named there."""

    operators: tuple[type, ...]
    only: Mapping[type, Mapping[str, tuple[Any, ...]]]

    def first(self, spec: DecoderSpec) -> tuple[str, Any] | None:
        """(`Class.field`, its value) of the first thing in `spec` that is not covered."""
        return next(self._misfits(spec), None)

    def _misfits(self, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        only = self.only.get(kind, {})
        if isinstance(value, Branch) and not isinstance(value.operator, self.operators):
            yield "Branch.operator", type(value.operator).__name__
        for f in fields(value):
            held = getattr(value, f.name)
            if f.name in only and held != f.default and held not in only[f.name]:
                yield f"{kind.__name__}.{f.name}", held
            for item in held if isinstance(held, tuple) else (held,):
                if hasattr(item, "__dataclass_fields__"):
                    yield from self._misfits(item)


TORCH = Limits(
    (
        Attention,
        ConvolvedAttention,
        MLA,
        MLP,
        MoE,
        Pass,
        LinearAttention,
        RoutedAttention,
        ShortConv,
        StateSpace,
    ),
    {
        LinearAttention: {"kind": ("gated_delta", "kda")},
        GateNetwork: {"activation": ("silu", "gelu", "gelu_tanh", "relu2")},
        Attention: {"shares_kv_of": ()},
        RouterWiring: {
            "router_input": ("normed", "residual", "residual_rms_scaled", "carried_mlp"),
            "hash_table": (),
            "shared_combination": ("add", "average"),
            "expert_pre_norm": (),
            "expert_post_norm": (),
        },
    },
)
# One token in one CUDA graph: kernels, and torch operators for what they do not cover.
GRAPH = Limits(
    tuple(kind for kind in TORCH.operators if kind is not ConvolvedAttention),
    {
        **TORCH.only,
        DecoderSpec: {"learned_embedding": (), "residual_dtype": ()},
        Branch: {"learned_sum": ()},
        MoE: {"gate_network": ()},
    },
)
# One token in one call of the C library on a CPU; what that does not cover goes through the torch
# operators.
NATIVE = Limits(
    (Attention, MLP, MoE),
    {
        DecoderSpec: {
            "head_bias": (),
            "norm_head": (),
            "embedding_scale": (),
            "learned_embedding": (),
            "residual_dtype": (),
            "logit_scale": (),
            "logit_softcap": (),
            "carried": (),
        },
        Norm: {"kind": (), "bias": (), "weight": (), "gate_rank": ()},
        Branch: {"keeps": (), "learned_sum": ()},
        Layer: {"learned_scale": ()},
        Rope: {"style": (), "sections": ()},
        RopeScaling: {"kind": ("linear", "yarn", "llama3", "alpha")},
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
                "gate_bias",
                "shares_kv_of",
            )
        },
        MLP: {"activation": (), "glu": (), "bias": (), "limit": (), "up_shift": ()},
        Experts: {
            "activation": (),
            "glu": (),
            "bias": (),
            "limit": (),
            "up_shift": (),
            "hidden": (),
        },
        MoE: {"output_bias": (), "sums_in_float32": (), "gate_network": ()},
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
    },
)


def refuse_unsupported(spec: DecoderSpec) -> None:
    """Raise a MoescopeError for the first thing that the torch interpreter does not do."""
    if (found := TORCH.first(spec)) is not None:
        name, value = found
        raise MoescopeError(
            f"{name} {value}: not implemented by the torch interpreter of this version",
            code=ExitCode.CHECKPOINT,
        )


def why_not_fused(spec: DecoderSpec, program: Limits) -> str:
    """Why a fused step, `NATIVE` or `GRAPH`, does not cover a decoder; "" where it does."""
    if (found := program.first(spec)) is not None:
        name, value = found
        return f"{name} {value}: no fused form"
    return _why_not_wired(spec) if program is NATIVE else ""


def _why_not_wired(spec: DecoderSpec) -> str:
    """What else the C library does not do."""
    for _, branch in spec.operators():
        operator = branch.operator
        rope = getattr(operator, "rope", None)
        if isinstance(operator, Attention) and rope and rope.dims != operator.head_dim:
            return f"Rope.dims {rope.dims}: no fused form"
        if branch.adds_to != "residual" or branch.reads != "residual":
            return f"Branch.reads {branch.reads}: no fused form"
    return ""
