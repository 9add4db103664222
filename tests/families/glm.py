"""GLM-4.5, GLM-4.7-Flash, GLM-5 and Solar Open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import MLA
from tests.families.deepseek import LATENT, UNSEEN_INDEXER, YARN
from tests.families.kit import Case, Mutant, on_attention, on_operators

_MOE: dict[str, Any] = {"n_routed_experts": 8, "moe_intermediate_size": 40}
_INDEXED = {**LATENT, **_MOE, "index_n_heads": 16, "index_head_dim": 12, "index_topk": 64}
TINY: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_MOE, "head_dim": 24},
    "glm4_moe_lite": {**LATENT, **_MOE},
    "glm_moe_dsa": {**_INDEXED, "first_k_dense_replace": 1},
    "solar_open": {**_MOE, "head_dim": 24},
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_SPARSE = ["sparse", "dense", "sparse", "dense"]
CASES = (
    Case("glm4_moe", "air", 0, {"attention_bias": True, "routed_scaling_factor": 2.5}),
    Case(
        "glm4_moe",
        "normed-groups",
        0,
        {
            **_GROUPS,
            "use_qk_norm": True,
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
        },
    ),
    Case("glm4_moe_lite", "flash", 2, {"v_head_dim": 24}),
    Case(
        "glm4_moe_lite",
        "groups",
        0,
        {
            **_GROUPS,
            "mlp_layer_types": _SPARSE,
            "rope_interleave": False,
            "rope_parameters": YARN,
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
    Case("glm_moe_dsa", "all-seen", 0),
    Case(
        "glm_moe_dsa",
        "shared-choice",
        0,
        {
            **_GROUPS,
            "index_topk": 9,
            "indexer_types": ["full", "shared", "full", "shared"],
            "mlp_layer_types": _SPARSE,
        },
    ),
    Case("solar_open", "released", 0, {"routed_scaling_factor": 1.7}),
    Case(
        "solar_open",
        "yarn-groups",
        0,
        {
            **_GROUPS,
            "attention_bias": True,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
        },
    ),
)


def _own_choice(spec: DecoderSpec) -> DecoderSpec:
    """Layers that share a choice see everything instead."""
    return on_operators(MLA, lambda m: replace(m, shares_choice=False))(spec)


MUTANTS = (
    Mutant("no shared choice", _own_choice, ("MLA.shares_choice",)),
    Mutant(
        "rope over the whole head",
        on_attention(lambda a: replace(a, rope=a.rope and replace(a.rope, dims=a.head_dim))),
        ("Rope.dims",),
        ("glm4_moe-air", "glm4_moe-normed-groups"),
    ),
)
EXEMPT = {("glm_moe_dsa-all-seen", what): why for what, why in UNSEEN_INDEXER.items()}
PUBLISHED: dict[str, dict[str, Any]] = {
    "glm4_moe": {  # 4.5 Air
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite",
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "partial_rotary_factor": 1.0,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "max_position_embeddings": 202752,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
}
COUNTS = {"glm4_moe": (106.85, 12.8), "glm4_moe_lite": (29.9, 3.58)}
