"""OLMoE and FlexOlmo."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Mutant, on_attention, replace

TINY: dict[str, dict[str, Any]] = {"olmoe": {"num_experts": 8}, "flex_olmo": {"num_experts": 7}}
LAYOUTS = {"olmoe": ("mlx",), "flex_olmo": ("mlx",)}
CASES = (
    Case("olmoe", "released", 0),
    Case(
        "olmoe",
        "clipped",
        205,
        {
            "clip_qkv": 0.75,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("flex_olmo", "released", 0),
    Case(
        "flex_olmo",
        "renormalised",
        0,
        {
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
)
MUTANTS = (
    Mutant(
        "clip_qkv",
        on_attention(lambda a: replace(a, clip_qkv=0.75)),
        ("Attention.clip_qkv",),
        ("olmoe-released",),
    ),
)
EXEMPT = {
    ("flex_olmo", "RouterWiring.router_input"): "no norm before its router: both inputs are one",
}
REFUSED_EDITS = (
    ("olmoe-released", "num_key_value_heads", 4, "num_key_value_heads"),
    ("olmoe-released", "num_experts", 16, "num_experts 16"),
    ("flex_olmo-released", "intermediate_size", 32, "intermediate_size 32"),
    ("olmoe-clipped", "tie_word_embeddings", False, "lm_head"),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
}
PUBLISHED["flex_olmo"] = {
    **PUBLISHED["olmoe"],
    "model_type": "flex_olmo",
    "rope_theta": 500000.0,
    "num_experts": 7,
    "num_experts_per_tok": 5,
}
COUNTS = {"olmoe": (6.92, 1.18)}
