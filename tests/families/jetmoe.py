"""JetMoE."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Read

TINY: dict[str, dict[str, Any]] = {
    "jetmoe": {
        "num_local_experts": 8,
        "kv_channels": 16,
        "num_key_value_heads": 2,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
    }
}


def _listen(module: Any, inputs: Any, output: Any) -> Any:
    """It returns what it sorted; the logits are last."""
    logits = output[-1]
    chosen = logits.topk(module.top_k, -1)
    return logits, chosen.values.softmax(-1).type_as(inputs[0]), chosen.indices


def _init(name: str, tensor: Any, noise: Any) -> Any:
    return 0.5 * noise if name.endswith(("experts.bias", "mlp.bias")) else None


INIT = {"jetmoe": _init}
READ = {"jetmoe": Read(r"JetMoeTopKGating$", _listen)}
CASES = (
    Case("jetmoe", "released", 0),
    Case(
        "jetmoe",
        "one-expert",
        0,
        {
            "num_experts_per_tok": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "activation_function": "gelu",
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "jetmoe": {
        "model_type": "jetmoe",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "kv_channels": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "activation_function": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }
}
COUNTS = {"jetmoe": (8.5, 2.33)}  # 2.27 of them without the tied embedding
