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
_ATTENDS = (2, 6, 10, 14, 18, 21)
PUBLISHED: dict[str, dict[str, Any]] = {
    "lfm2_moe": {
        "model_type": "lfm2_moe",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention" if n in _ATTENDS else "conv" for n in range(24)],
    }
}
COUNTS = {"lfm2_moe": (8.34, 1.56)}
