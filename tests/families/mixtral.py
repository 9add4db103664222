"""Mixtral."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2}}
LAYOUTS = {"mixtral": ("mlx",)}
CASES = (
    Case("mixtral", "released", 6),
    Case(
        "mixtral",
        "window-linear",
        0,
        {
            "sliding_window": 5,
            "head_dim": 24,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        },
    ),
)
REFUSED_EDITS = (("mixtral-released", "num_local_experts", 4, "num_local_experts 4"),)
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "max_position_embeddings": 32768,
    }
}
COUNTS = {"mixtral": (46.7, 12.8)}
