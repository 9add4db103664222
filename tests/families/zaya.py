"""ZAYA1."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Read

_ROPES = {
    "hybrid": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    "hybrid_sliding": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "zaya": {
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "router_hidden_size": 24,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPES,
    }
}


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Gains near 1, and less of the embedding in every sum: a tied head would repeat it."""
    if name.endswith("residual_scale"):
        return 0.6 + 0.2 * noise
    if name.endswith("_scale"):
        return 1.0 + 0.2 * noise
    if name.endswith(("hidden_states_bias", "residual_bias")):
        return 0.03 * noise
    if name.endswith("qk_norm.temp"):
        return 1.5 + 0.5 * noise
    if name.endswith("balancing_biases"):
        return 0.1 * noise
    if name.endswith("router_mlp.out_proj.weight"):
        return 3.0 * noise / tensor.shape[-1] ** 0.5
    if ".conv_qk_" in name and name.endswith("weight"):
        return noise / (tensor.shape[-1] * tensor.shape[-2]) ** 0.5
    return None


INIT = {"zaya": _init}


def _listen(module: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Any, Any, Any]:
    """A token that is skipped is given to expert 0 with weight 0: here to the class it chose."""
    logits, weights, ids = output[:3]
    return logits, weights, ids.masked_fill(weights == 0, module.config.num_experts)


READ = {"zaya": Read(r"ZayaRouter$", _listen)}
CASES = (
    Case("zaya", "released", 15),
    Case(
        "zaya",
        "sliding",
        1,
        {
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid_sliding", "hybrid"],
            "sliding_window": 7,
            "attention_bias": True,
            "lm_head_bias": True,
            "tie_word_embeddings": False,
            "cca_time0": 3,
            "cca_time1": 4,
            "num_key_value_heads": 1,
            "hidden_act": "gelu",
            "rope_parameters": {
                "hybrid": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                "hybrid_sliding": {**_ROPES["hybrid_sliding"], "partial_rotary_factor": 0.25},
            },
        },
    ),
)
EXEMPT = {
    ("zaya", "RouterWiring.router_input"): "goes with MoE.gate_network, whose fields are turned"
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "zaya": {
        "model_type": "zaya",
        "vocab_size": 262272,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "moe_intermediate_size": 2048,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "router_hidden_size": 256,
        "cca_time0": 2,
        "cca_time1": 2,
        "hidden_act": "silu",
        "layer_types": ["hybrid"] * 40,
        "rope_parameters": {**_ROPES, "rope_type": "default"},
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
}
COUNTS = {"zaya": (8.84, 1.29)}  # 8.30 and 0.75 without the tied embedding
