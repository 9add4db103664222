"""Flint and Kolibri 1."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_SIZES: dict[str, Any] = {
    "head_dim": 24,
    "num_experts": 8,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "sliding_window": 6,
}
TINY = {
    "flint": {**_SIZES, "layer_types": ["full_attention", *["sliding_attention"] * 2] * 2},
    "kolibri1": {**_SIZES, "num_hidden_layers": 5},
}
TINY["flint"]["num_hidden_layers"] = 6
CASES = (
    Case("flint", "released", 0),
    Case(
        "flint",
        "others",
        0,
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    Case("kolibri1", "released", 0, {"norm_topk_prob": True}),
    Case(
        "kolibri1",
        "others",
        0,
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
)
EXEMPT = {("kolibri1", "RouterPolicy.score_order"): "a sigmoid keeps the order of logits"}
