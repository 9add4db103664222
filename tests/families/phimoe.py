"""Phi-3.5-MoE."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_SHORT = [1.0, 1.1, 1.3, 1.6, 1.9, 2.5, 3.1, 4.0]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": _SHORT,
    "long_factor": [2 * factor for factor in _SHORT],
    "short_mscale": 1.2,
    "long_mscale": 1.4,
    "original_max_position_embeddings": 250,
}
TINY: dict[str, dict[str, Any]] = {
    "phimoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": _LONGROPE,
        "original_max_position_embeddings": 250,
    }
}
CASES = (
    Case("phimoe", "released", 1),
    Case(
        "phimoe",
        "long-window",
        6,
        {
            "router_jitter_noise": 0.05,
            "attention_bias": False,
            "lm_head_bias": False,
            "sliding_window": 6,
            # transformers keeps the short factors there, so both are the same
            "rope_parameters": {
                **_LONGROPE,
                "long_factor": _SHORT,
                "original_max_position_embeddings": 4,
            },
            "original_max_position_embeddings": 4,
        },
    ),
)
EXEMPT = {
    ("phimoe", "RouterPolicy.num_experts_per_tok"): "SparseMixer picks two",
    ("phimoe-released", "RopeScaling.long_factor"): "of lanes that are longer than these",
    ("phimoe-released", "RopeScaling.long_mscale"): "of lanes that are longer than these",
    ("phimoe-long-window", "RopeScaling.short_factor"): "of lanes that are shorter than these",
    ("phimoe-long-window", "RopeScaling.short_mscale"): "of lanes that are shorter than these",
    ("phimoe", "RopeScaling.attention_factor"): "both mscales are given",
    ("phimoe", "RopeScaling.factor"): "only the usual attention factor depends on it",
    ("phimoe", "RopeScaling.kind"): "other kinds have no factor for every frequency",
    ("phimoe", "RopeScaling.original_context"): "lanes stay on one side of it",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "phimoe": {
        "model_type": "phimoe",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 131072,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 64,
            "long_factor": [1.0 + n / 2 for n in range(64)],
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"phimoe": (41.9, 6.6)}
