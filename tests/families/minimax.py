"""MiniMax-M2."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "minimax_m2": {"head_dim": 24, "num_local_experts": 8},
}
CASES = (
    Case("minimax_m2", "released", 0, {"rotary_dim": 12}),
    Case(
        "minimax_m2",
        "whole",
        0,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "minimax_m2": {
        "model_type": "minimax_m2",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "attn_type_list": [1] * 62,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "max_position_embeddings": 196608,
        "rope_theta": 5000000,
    },
}
COUNTS = {"minimax_m2": (228.7, 10.4)}
