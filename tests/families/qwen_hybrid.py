"""Qwen3-Next and Qwen3.5-MoE: gated delta rule and gated attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.operators import LinearAttention, Norm
from tests.families.kit import Case, Mutant, on_attention, on_branches, on_operators

_MIXER: dict[str, Any] = {
    "head_dim": 32,
    "num_experts": 8,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
TINY = {"qwen3_next": _MIXER, "qwen3_5_moe_text": _MIXER}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Norms hold w of 1 + w, but for the delta rule's own; decays between slow and fast."""
    if name.endswith("A_log"):
        return noise - 1.0
    if name.endswith("dt_bias"):
        return 0.5 * noise
    if name.endswith("linear_attn.norm.weight"):
        return 1.0 + 0.25 * noise
    return 0.25 * noise if name.endswith("norm.weight") else None


INIT = {name: _init for name in TINY}
_FULL = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
CASES = (
    Case("qwen3_next", "released", 2),
    Case(
        "qwen3_next",
        "sparse-steps",
        0,
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "layer_types": _FULL,
            "linear_num_key_heads": 4,
        },
    ),
    Case("qwen3_5_moe_text", "released", 0),
    Case(
        "qwen3_5_moe_text",
        "one-head-each",
        0,
        {"attention_bias": True, "layer_types": _FULL, "linear_num_key_heads": 4},
    ),
)


def _plain(norm: Norm | None) -> Norm | None:
    return norm and replace(norm, kind="rms")


MUTANTS = (
    Mutant(
        "norms hold w, not 1 + w",
        on_branches(lambda b: replace(b, pre_norm=_plain(b.pre_norm))),
        ("Norm.kind",),
    ),
    Mutant(
        "short convolution's gate",
        on_operators(LinearAttention, lambda a: replace(a, out_gate="sigmoid")),
        ("LinearAttention.out_gate",),
        tuple(case.id for case in CASES),
    ),
    Mutant(
        "delta norm's eps",
        on_operators(LinearAttention, lambda a: replace(a, out_norm=replace(a.out_norm, eps=0.5))),
        ("LinearAttention.out_norm",),
    ),
    Mutant(
        "rope over the whole head",
        on_attention(lambda a: replace(a, rope=a.rope and replace(a.rope, dims=a.head_dim))),
        ("Rope.dims",),
        tuple(case.id for case in CASES),
    ),
)
