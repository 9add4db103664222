"""Aria's text."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "aria_text": {"num_experts_per_tok": None, "moe_num_experts": 8, "moe_topk": 3}
}
CASES = (
    Case("aria_text", "released", 0),
    Case(
        "aria_text",
        "biases",
        0,
        {
            "moe_num_shared_experts": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "num_key_value_heads": None,
            "moe_topk": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "aria_text": {
        "model_type": "aria_text",
        "vocab_size": 100352,
        "hidden_size": 2560,
        "intermediate_size": 1664,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "moe_num_experts": 64,
        "moe_topk": 6,
        "moe_num_shared_experts": 2,
        "max_position_embeddings": 65536,
        "rope_theta": 5000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"aria_text": (24.9, 3.85)}
