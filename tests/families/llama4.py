"""Llama 4's text tower."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Read

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "intermediate_size_mlp": 56,
        "attention_chunk_size": 6,
        "floor_scale": 8,
        "attn_scale": 0.4,
        "rope_parameters": {**_LLAMA3, "rope_type": "default"},
    }
}


def _listen(module: Any, inputs: Any, output: Any) -> Any:
    """Scores of all experts, 0 for those not chosen, and logits."""
    scores, logits = output
    ids = logits.topk(module.top_k, -1).indices
    return logits, scores.gather(-1, ids), ids


READ = {"llama4_text": Read(r"Llama4Router$", _listen)}
EXEMPT = {
    ("llama4_text", "Attention.qk_norm_after_rope"): "a norm without weight: rotations keep it",
}
CASES = (
    Case("llama4_text", "scout", 0),
    Case(
        "llama4_text",
        "maverick",
        1,
        {
            "num_hidden_layers": 6,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "no_rope_layers": [1, 0, 1, 1, 0, 1],
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "attn_temperature_tuning": False,
            "rope_parameters": _LLAMA3,
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [],
        "use_qk_norm": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 10485760,
        "attention_chunk_size": 8192,
        "rms_norm_eps": 1e-5,
    }
}
COUNTS = {"llama4_text": (107.8, 16.0)}
