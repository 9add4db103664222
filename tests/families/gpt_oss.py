"""gpt-oss."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
TINY: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 7,
        "rope_parameters": _YARN,
        "swiglu_limit": 2.5,
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Biases of the experts, and sinks that take a share of what is attended to."""
    if name.endswith(("proj_bias", "sinks")):
        return noise
    return None


INIT = {"gpt_oss": _init}
CASES = (
    Case("gpt_oss", "released", 2),
    Case(
        "gpt_oss",
        "full-first",
        0,
        {
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
            "attention_bias": False,
            "num_experts_per_tok": 1,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 1.5,
            "tie_word_embeddings": True,
            "rope_parameters": {**_YARN, "truncate": True, "factor": 8.0, "beta_fast": 2.0},
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"gpt_oss": (20.9, 3.61)}
