"""Hunyuan-A13B."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case, Read

_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
TINY: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {"num_experts": 8, "head_dim": 24, "rope_parameters": _ALPHA}
}
READ = {"hunyuan_v1_moe": Read(r"HunYuanMoEV1Gate$", lambda module, inputs, output: output)}
CASES = (
    Case("hunyuan_v1_moe", "released", 0),
    Case(
        "hunyuan_v1_moe",
        "other-in-each-layer",
        17,
        {
            "moe_topk": [1, 3, 2, 4],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe",
        "vocab_size": 128167,
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_head_dim": 128,
        "num_experts": 64,
        "num_shared_expert": [1] * 32,
        "moe_topk": [8] * 32,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
}
COUNTS = {"hunyuan_v1_moe": (80.4, 13.0)}
