"""Mistral 4."""

from __future__ import annotations

from typing import Any

from tests.families.deepseek import LATENT, YARN
from tests.families.kit import Case

_WARM = {**YARN, "original_max_position_embeddings": 16, "beta_fast": 0.13, "beta_slow": 0.017}
TINY: dict[str, dict[str, Any]] = {
    "mistral4": {
        **LATENT,
        "n_routed_experts": 8,
        "rope_parameters": {**_WARM, "llama_4_scaling_beta": 0.4},
    },
}
CLASSES = {"mistral4": "Mistral4ForCausalLM"}
CASES = (
    Case("mistral4", "released", 0),
    Case(
        "mistral4",
        "groups",
        1,
        {
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "rope_interleave": False,
            "v_head_dim": 24,
        },
    ),
)
EXEMPT = {
    ("mistral4", "RouterPolicy.group_mask_fill"): "softmax scores are above 0",
}
