"""Gemma 4's text tower."""

from __future__ import annotations

from typing import Any

from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import Pass
from tests.families.kit import Case, Mutant, Read, replace

_ROPES = {
    "full_attention": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
        "rope_type": "proportional",
    },
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
TINY: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 40,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 7,
        "final_logit_softcapping": 12.0,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "rope_parameters": _ROPES,
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Scales of routers and layers of one size or another, never near 0."""
    if name.endswith(("layer_scalar", "per_expert_scale")):
        return 1.0 + 0.2 * noise.tanh()
    if "embed_tokens" in name:  # tied, and multiplied by 8
        return 0.02 * noise
    return 4.0 + noise if name.endswith("router.scale") else None


INIT = {"gemma4_text": _init}
READ = {
    # it returns probabilities, whose logarithms are as good as its logits
    "gemma4_text": Read(
        r"Gemma4TextRouter$", lambda module, inputs, out: (out[0].log(), out[1], out[2])
    )
}
CASES = (
    Case("gemma4_text", "released", 0),
    Case(
        "gemma4_text",
        "own-values",
        1,
        {
            "attention_k_eq_v": False,
            "attention_bias": True,
            "final_logit_softcapping": None,
            "global_head_dim": 24,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                **_ROPES,
                "full_attention": {**_ROPES["full_attention"], "partial_rotary_factor": 0.5},
            },
        },
    ),
)


def _without_sum(spec: DecoderSpec) -> DecoderSpec:
    """Dense block and experts straight into the residual, past the norm of their sum."""
    layers = (
        tuple(
            replace(branch, adds_to="residual")
            for branch in layer.branches
            if not isinstance(branch.operator, Pass)
        )
        for layer in spec.layers
    )
    pairs = zip(spec.layers, layers, strict=True)
    return replace(spec, layers=tuple(replace(old, branches=new) for old, new in pairs))


MUTANTS = (Mutant("no norm of the sum", _without_sum, ("Branch.adds_to", "Branch.reads")),)
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "rope_parameters": _ROPES,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
    }
}
COUNTS = {"gemma4_text": (25.2, 3.8)}
