"""Hy3."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "hy_v3": {"head_dim": 24, "num_experts": 8, "moe_intermediate_size": 40},
}
CASES = (
    Case("hy_v3", "released", 1),
    Case(
        "hy_v3",
        "biases",
        3,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_shared_experts": 2,
            "enable_moe_fp32_combine": False,
            "router_scaling_factor": 1.3,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        },
    ),
)
