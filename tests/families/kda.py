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
