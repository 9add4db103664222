"""Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "norm_topk_prob": True,
    },
}
LAYOUTS = {"qwen2_moe": ("mlx",), "qwen3_moe": ("mlx",)}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = (
    Case("qwen2_moe", "released", 0),
    Case(
        "qwen2_moe",
        "sparse-window",
        2,
        {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 4,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    Case("qwen3_moe", "released", 0),
    Case(
        "qwen3_moe",
        "window-yarn",
        0,
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "mlp_only_layers": [0],
            "rope_parameters": _YARN,
        },
    ),
)
REFUSED_EDITS = (
    ("qwen2_moe-sparse-window", "decoder_sparse_step", 1, "mlp.gate.weight"),
    ("qwen2_moe-sparse-window", "mlp_only_layers", [1], "mlp.gate_proj"),
    ("qwen3_moe-window-yarn", "mlp_only_layers", [], "mlp.gate.weight"),
    ("qwen3_moe-released", "head_dim", 16, "head_dim"),
    (
        "qwen2_moe-released",
        "shared_expert_intermediate_size",
        32,
        "shared_expert_intermediate_size",
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 48,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 8192,
    },
}
COUNTS = {"qwen3_moe": (30.5, 3.04), "qwen2_moe": (14.3, 2.4)}
