"""Kimi Linear and Ling 3: KDA and latent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.operators import LinearAttention
from tests.families.kit import Case, Mutant, on_operators

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
TINY: dict[str, dict[str, Any]] = {
    "kimi_linear": {**_LATENT, "linear_head_dim": 12, "linear_num_heads": 3},
    "bailing_hybrid": {**_LATENT, "head_dim": 12, "n_group": 1, "topk_group": 1},
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Decays between slow and fast."""
    if name.endswith("A_log"):
        return 0.5 * noise - 1.0
    if name.endswith("dt_bias"):
        return 0.5 * noise
    return 0.3 * noise if name.endswith("correction_bias") else None


INIT = {name: _init for name in TINY}
CASES = (
    Case("kimi_linear", "released", 0),
    Case(
        "kimi_linear",
        "grouped",
        0,
        {
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 16,
            "norm_topk_prob": False,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "linear_conv_kernel_dim": 3,
        },
    ),
    Case("bailing_hybrid", "released", 3),
    Case(
        "bailing_hybrid",
        "grouped",
        0,
        {
            "n_group": 4,
            "topk_group": 2,
            "kda_safe_gate": False,
            "norm_topk_prob": False,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
)


def _kda(**edits: Any) -> Any:
    return on_operators(LinearAttention, lambda a: replace(a, **edits))


EXEMPT = {("kimi_linear", "MLA.rope"): "there is none: positions come from the linear layers"}
MUTANTS = (
    Mutant("bound of the decay", _kda(decay_floor=-1.0), ("LinearAttention.decay_floor",)),
    Mutant("gate by silu", _kda(out_gate="silu"), ("LinearAttention.out_gate",)),
)
_FULL = [4, 8, 12, 16, 20, 24, 27]
PUBLISHED: dict[str, dict[str, Any]] = {
    "kimi_linear": {
        "model_type": "kimi_linear",
        "vocab_size": 163840,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 27,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "num_expert_group": 1,
        "topk_group": 1,
        "linear_attn_config": {
            "full_attn_layers": _FULL,
            "kda_layers": [n for n in range(1, 28) if n not in _FULL],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 1048576,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"kimi_linear": (49.1, 3.11)}
