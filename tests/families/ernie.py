"""ERNIE 4.5."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Biases beside which scores still count."""
    return 0.15 * noise if name.endswith("correction_bias") else None


INIT = {"ernie4_5_moe": _init}
CASES = (
    Case("ernie4_5_moe", "released", 1),
    Case(
        "ernie4_5_moe",
        "every-other-layer",
        68,
        {
            "num_hidden_layers": 6,
            "moe_layer_start_index": 2,
            "moe_layer_end_index": 4,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 0,
            "use_bias": True,
            "tie_word_embeddings": True,
            "moe_k": 2,
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "tie_word_embeddings": True,
    }
}
COUNTS = {"ernie4_5_moe": (21.8, 3.3)}
