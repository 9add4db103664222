"""dots.llm1 and K-EXAONE."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
    },
    "exaone_moe": {"num_experts": 8, "moe_intermediate_size": 40, "sliding_window": 6},
}
_GROUPS = {"n_group": 4, "topk_group": 2}
CASES = (
    Case("dots1", "released", 1, {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    Case(
        "dots1",
        "windows",
        3,
        {
            **_GROUPS,
            "sliding_window": 5,
            "max_window_layers": 2,
            "attention_bias": True,
            "head_dim": 24,
        },
    ),
    Case("exaone_moe", "released", 0),
    Case(
        "exaone_moe",
        "groups",
        0,
        {
            **_GROUPS,
            "num_shared_experts": 2,
            "norm_topk_prob": False,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "head_dim": 24,
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "dots1": {
        "model_type": "dots1",
        "vocab_size": 152064,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_shared_experts": 2,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rope_theta": 10000000,
    },
}
COUNTS = {"dots1": (142.8, 13.4)}
