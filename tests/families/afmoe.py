"""AFMoE."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "afmoe": {
        "head_dim": 24,
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "sliding_window": 6,
    },
}
CASES = (
    Case("afmoe", "released", 0, {"mup_enabled": True, "route_scale": 2.4}),
    Case(
        "afmoe",
        "others",
        4,
        {
            "attention_bias": True,
            "num_dense_layers": 2,
            "num_shared_experts": 1,
            "num_key_value_heads": None,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
)
