"""LFM2-MoE: short convolutions and attention."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    return 0.3 * noise if name.endswith("expert_bias") else None


INIT = {"lfm2_moe": _init}
CASES = (
    Case("lfm2_moe", "released", 0),
    Case(
        "lfm2_moe",
        "unbiased",
        0,
        {
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "conv_bias": True,
            "conv_L_cache": 4,
            "routed_scaling_factor": 1.7,
            "tie_word_embeddings": True,
            "num_dense_layers": 0,
        },
    ),
)
