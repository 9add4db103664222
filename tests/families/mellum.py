"""Mellum 2."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY: dict[str, dict[str, Any]] = {
    "mellum": {
        "num_local_experts": 8,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": _ROPES,
    }
}
CASES = (
    Case("mellum", "released", 0),
    Case(
        "mellum",
        "dense-first",
        3,
        {
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            "norm_topk_prob": False,
            "attention_bias": True,
            "rope_parameters": {
                **_ROPES,
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            },
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "mellum": {
        "model_type": "mellum",
        "vocab_size": 98304,
        "hidden_size": 2304,
        "moe_intermediate_size": 896,
        "intermediate_size": 7168,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 7,
        "rope_parameters": _ROPES,
        "max_position_embeddings": 131072,
    }
}
COUNTS = {"mellum": (12.1, 2.21)}  # 2.44 with the whole embedding
