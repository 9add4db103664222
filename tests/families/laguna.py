"""Laguna."""

from __future__ import annotations

from typing import Any

from tests.families.deepseek import YARN
from tests.families.kit import Case

_TYPES = ["full_attention", "sliding_attention"] * 2
TINY: dict[str, dict[str, Any]] = {
    "laguna": {
        "head_dim": 24,
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "sliding_window": 6,
        "layer_types": _TYPES,
    },
}
CASES = (
    Case(
        "laguna",
        "released",
        0,
        {
            "num_attention_heads_per_layer": [4, 6, 4, 2],
            "moe_routed_scaling_factor": 2.5,
            "moe_router_logit_softcapping": 3.0,
        },
    ),
    Case(
        "laguna",
        "per-element",
        0,
        {
            "gating": "per-element",
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "rope_parameters": {
                "full_attention": {**YARN, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
)
EXEMPT = {("laguna-per-element", "RouterPolicy.scale_site"): "the factor is 1"}
REFUSED_EDITS = (
    ("laguna-released", "num_attention_heads_per_layer", [4, 4, 4, 4], "num_attention_heads"),
    ("laguna-released", "gating", "per-element", "gate rows"),
)
