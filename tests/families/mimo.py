"""MiMo-V2-Flash: sinks and narrow values on sliding layers."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "mimo_v2_flash": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 40,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    return 0.3 * noise if name.endswith("correction_bias") else None


INIT = {"mimo_v2_flash": _init}
CASES = (
    Case("mimo_v2_flash", "released", 0),
    Case(
        "mimo_v2_flash",
        "grouped",
        3,
        {
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.8,
            "attention_bias": True,
            "attention_value_scale": 1.3,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
        },
    ),
)
