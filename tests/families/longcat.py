"""LongCat-Flash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.decoder import DecoderSpec, Layer
from tests.families.deepseek import LATENT
from tests.families.kit import Case, Mutant

TINY: dict[str, dict[str, Any]] = {
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "num_experts_per_tok": 3,
        "intermediate_size": 96,
        "expert_ffn_hidden_size": 40,
        "routed_scaling_factor": 1.5,
    },
}
CASES = (
    Case("longcat_flash", "released", 2),
    Case("longcat_flash", "all-real", 1, {"zero_expert_num": 0, "attention_bias": True}),
)


def _no_shortcut(spec: DecoderSpec) -> DecoderSpec:
    """What the experts give is there for the second attention already."""
    layers = []
    for layer in spec.layers:
        *branches, _ = layer.branches
        layers.append(
            Layer(tuple(replace(b, adds_to="residual") if b.name == "moe" else b for b in branches))
        )
    return replace(spec, layers=tuple(layers))


MUTANTS = (Mutant("no shortcut", _no_shortcut, ("Branch.adds_to",), tuple(c.id for c in CASES)),)
EXEMPT = {("longcat_flash", "fused"): "in memory, experts that compute nothing have tensors too"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "longcat_flash": {
        "model_type": "longcat_flash",
        "vocab_size": 131072,
        "hidden_size": 6144,
        "ffn_hidden_size": 12288,
        "expert_ffn_hidden_size": 2048,
        "num_layers": 28,
        "num_attention_heads": 64,
        "attention_method": "MLA",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "zero_expert_type": "identity",
        "moe_topk": 12,
        "routed_scaling_factor": 6.0,
        "router_bias": False,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
    },
}
COUNTS = {"longcat_flash": (560.7, 31.4)}
