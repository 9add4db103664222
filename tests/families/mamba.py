"""Nemotron-H, Granite 4 and Jamba: state spaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.operators import StateSpace
from tests.families.kit import Case, Mutant, on_operators

TINY: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 12,
        "conv_kernel": 4,
        "n_routed_experts": 8,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "routed_scaling_factor": 2.5,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 56,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 12,
        "mamba_d_conv": 4,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.5,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "jamba": {
        "num_experts": 8,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 12,
        "mamba_dt_rank": 6,
    },
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Decays between slow and fast; steps well above the smallest."""
    if name.endswith("A_log"):
        return 0.5 * noise
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return 0.5 * noise
    if name.endswith((".D", "norm_f.weight", ".norm.weight")):
        return 1.0 + 0.25 * noise
    return 0.3 * noise if name.endswith("correction_bias") else None


INIT = {name: _init for name in TINY}
CASES = (
    Case("nemotron_h", "grouped", 0, {"n_group": 4, "topk_group": 2}),
    Case(
        "nemotron_h",
        "latent",
        2,
        {
            "moe_latent_size": 24,
            "norm_topk_prob": False,
            "use_conv_bias": False,
            "layers_block_type": ["moe", "linear_attention", "moe", "full_attention"],
        },
    ),
    Case("granitemoehybrid", "released", 0),
    Case(
        "granitemoehybrid",
        "rotated",
        0,
        {
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("jamba", "released", 0),
    Case(
        "jamba",
        "sparse-first",
        0,
        {"expert_layer_offset": 0, "attn_layer_period": 3, "mamba_proj_bias": True},
    ),
)


def _ssm(**edits: Any) -> Any:
    return on_operators(StateSpace, lambda m: replace(m, **edits))


MUTANTS = (Mutant("smallest step", _ssm(dt_floor=0.9), ("StateSpace.dt_floor",)),)
PUBLISHED: dict[str, dict[str, Any]] = {
    "jamba": {
        "model_type": "jamba",
        "vocab_size": 65536,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"jamba": (51.6, 11.8)}  # 52 and 12 by its paper
