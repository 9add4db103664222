"""MiniMax-M3's text."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "minimax_m3_vl_text": {
        "num_local_experts": 8,
        "head_dim": 24,
        "rotary_dim": 12,
        "dense_intermediate_size": 56,
        "shared_intermediate_size": 40,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        },
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Norms hold w of 1 + w."""
    if name.endswith("norm.weight"):
        return 0.25 * noise
    return 0.3 * noise if name.endswith("correction_bias") else None


def _older(config: dict[str, Any]) -> None:
    config["partial_rotary_factor"] = config["rotary_dim"] / config["head_dim"]


OLDER = {"minimax_m3_vl_text": _older}
INIT = {"minimax_m3_vl_text": _init}
CASES = (
    Case("minimax_m3_vl_text", "released", 0),
    Case(
        "minimax_m3_vl_text",
        "sparse",
        0,
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 32,
            "index_topk_blocks": 8,
            "routed_scaling_factor": 1.4,
            "swiglu_alpha": 1.2,
            "rotary_dim": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
)
