"""DBRX."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Read

_FFN = {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3}
# transformers goes by the one, published checkpoints by the other
_THETA = 20000.0
TINY: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"clip_qkv": 0.8, "kv_n_heads": 2, "rope_theta": _THETA},
        "ffn_config": _FFN,
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
    }
}


def _listen(module: Any, inputs: Any, output: Any) -> Any:
    """The block routes; what it decided is asked of it again."""
    logits = module.router(inputs[0])
    return logits, *module.route_tokens_to_experts(logits)


def _init(name: str, tensor: Any, noise: Any) -> Any:
    if "wte" in name:
        return noise
    return (
        1.0 + 0.25 * noise
        if name.endswith(("norm_1.weight", "norm_2.weight", "norm_f.weight"))
        else None
    )


INIT = {"dbrx": _init}
READ = {"dbrx": Read(r"DbrxFFN$", _listen)}
CASES = (
    Case("dbrx", "released", 0),
    Case(
        "dbrx",
        "not-renormalised",
        1,
        {
            "attn_config": {"clip_qkv": 3.0, "kv_n_heads": 4, "rope_theta": _THETA},
            "ffn_config": {**_FFN, "moe_normalize_expert_weights": None},
        },
    ),
    Case("dbrx", "by-length", 0, {"ffn_config": {**_FFN, "moe_normalize_expert_weights": 2.0}}),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "max_seq_len": 32768,
        "vocab_size": 100352,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752,
            "moe_jitter_eps": 0.01,
            "moe_loss_weight": 0.05,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "tie_word_embeddings": False,
    }
}
COUNTS = {"dbrx": (131.6, 36.0)}
