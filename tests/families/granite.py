"""Granite's Mixture-of-Experts models, but for the hybrids."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}
_TINY: dict[str, Any] = {"num_local_experts": 8, **_MULTIPLIERS}
TINY: dict[str, dict[str, Any]] = {
    "granitemoe": _TINY,
    "granitemoeshared": {**_TINY, "shared_intermediate_size": 56},
    "granitemoe_swa": {
        **_TINY,
        "sliding_window": 7,
        "layer_rope_theta": [10000.0, 10000.0, 0.0, 500.0],
    },
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    return noise if name.endswith("sinks") else None


INIT = {"granitemoe_swa": _init}
_PLAIN = {name: 1.0 for name in _MULTIPLIERS if name != "attention_multiplier"}
CASES = (
    Case("granitemoe", "released", 0),
    Case(
        "granitemoe",
        "plain",
        0,
        {**_PLAIN, "attention_bias": True, "num_experts_per_tok": 2, "num_key_value_heads": None},
    ),
    Case("granitemoeshared", "released", 2),
    Case("granitemoeshared", "not-shared", 0, {"shared_intermediate_size": 0}),
    Case("granitemoe_swa", "released", 0),
    Case(
        "granitemoe_swa",
        "shared",
        0,
        {
            "shared_intermediate_size": 56,
            "layer_rope_theta": None,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "granitemoe": {
        "model_type": "granitemoe",
        "vocab_size": 49155,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 40,
        "num_experts_per_tok": 8,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }
}
COUNTS = {"granitemoe": (3.3, 0.88)}
