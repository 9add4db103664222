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
PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {  # Trinity Mini
        "model_type": "afmoe",
        "vocab_size": 200192,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 32,
        "num_dense_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 2048,
        "global_attn_every_n_layers": 4,
        "num_experts": 128,
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 2.826,
        "n_group": 1,
        "topk_group": 1,
        "mup_enabled": True,
        "max_position_embeddings": 131072,
        "rope_theta": 10000,
        "rope_scaling": None,
    },
}
COUNTS = {"afmoe": (26.1, 3.1)}
