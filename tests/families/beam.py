"""Beam."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "beam": {
        "head_dim": 24,
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "n_group": 4,
        "topk_group": 2,
        "sliding_window": 6,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
}
CASES = (
    Case("beam", "released", 0, {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    Case(
        "beam",
        "ungrouped",
        0,
        {
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "attention_bias": True,
            "final_logit_softcapping": None,
            "rope_parameters": {
                "sliding_attention": None,
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
)
_NORMED = "the norm after the experts takes it back"
EXEMPT = {
    ("beam", name): _NORMED
    for name in ("RouterPolicy.routed_scaling_factor", "RouterPolicy.scale_site")
}
