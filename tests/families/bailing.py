"""Ling and Ring, compared with mlx-lm."""

from __future__ import annotations

from typing import Any

from tests.families.deepseek import NO_MLX
from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "bailing_moe": {
        "num_experts": 8,
        "num_shared_experts": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "first_k_dense_replace": 1,
    },
}
MLX = {"bailing_moe": lambda gate, x: gate.gate_proj(x)}
_SIGMOID = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
CASES = (
    Case(
        "bailing_moe",
        "ling-2",
        1,
        {**_SIGMOID, "partial_rotary_factor": 0.5, "moe_shared_expert_intermediate_size": 24},
    ),
    Case("bailing_moe", "groups", 2, {**_SIGMOID, "n_group": 4, "topk_group": 2}),
    Case(
        "bailing_moe",
        "ling-1",
        2,
        {
            "norm_head": True,
            "norm_topk_prob": False,
            "use_qkv_bias": True,
            "use_bias": True,
            "num_shared_experts": 0,
            "first_k_dense_replace": 0,
        },
    ),
)


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Biases above 0: mlx-lm would choose masked experts before those below."""
    return noise.abs() if name.endswith("expert_bias") else None


INIT = {"bailing_moe": _init}
EXEMPT = {("bailing_moe", what): why for what, why in NO_MLX.items()}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bailing_moe": {  # Ling-mini-2.0
        "model_type": "bailing_moe",
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.5,
        "num_experts": 256,
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 32768,
        "rope_theta": 600000,
        "rope_scaling": None,
    },
}
COUNTS = {"bailing_moe": (16.26, 1.11)}
