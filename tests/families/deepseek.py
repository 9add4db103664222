"""DeepSeek-V2, -V3 and -V3.2, and Kimi-K2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.operators import MLA
from tests.families.kit import Case, Edit, Mutant, on_operators

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 40,
}
_V3: dict[str, Any] = {
    **LATENT,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
TINY: dict[str, dict[str, Any]] = {
    "deepseek": {"n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 40},
    "deepseek_v2": {
        **LATENT,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": _V3,
    "kimi_k2": {**_V3, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "deepseek_v32": {**_V3, "index_n_heads": 16, "index_head_dim": 12, "index_topk": 64},
}
# Each of these numbers moves a frequency of eight dims.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}
MLX = {"deepseek": lambda gate, x: x @ gate.weight.T}
SAME = {"kimi_k2": "deepseek_v3"}
CASES = (
    Case("deepseek", "released", 0, {"first_k_dense_replace": 1, "num_key_value_heads": 4}),
    Case(
        "deepseek",
        "others",
        0,
        {
            "n_shared_experts": None,
            "attention_bias": True,
            "moe_layer_freq": 2,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
    Case("deepseek_v2", "greedy", 0, {"q_lora_rank": None, "routed_scaling_factor": 1.0}),
    Case(
        "deepseek_v2",
        "groups",
        1,
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
            "rope_parameters": YARN,
            "attention_bias": True,
            "mlp_bias": True,
            "v_head_dim": 24,
        },
    ),
    Case("deepseek_v3", "groups", 0),
    Case(
        "deepseek_v3",
        "yarn",
        0,
        {
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "rope_parameters": YARN,
            "attention_bias": True,
            "rope_interleave": False,
        },
    ),
    Case(
        "deepseek_v3",
        "moonlight",
        0,
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": False},
    ),
    Case("kimi_k2", "instruct", 0, {"routed_scaling_factor": 2.827, "rope_parameters": YARN}),
    Case("kimi_k2", "moonlight", 0, {"q_lora_rank": None}),
    Case("deepseek_v32", "dense", 0),
    Case(
        "deepseek_v32",
        "sparse",
        0,
        {"index_topk": 9, "rope_parameters": YARN, "attention_bias": True},
    ),
)
# Of an indexer where the context is shorter than index_topk: every token is seen.
UNSEEN_INDEXER = {
    name: "every token is seen"
    for name in ("MLA.indexer", "Indexer.topk", "Indexer.rope", "Norm.kind", "Norm.bias")
}
NO_MLX = {
    "fused": "the models of mlx-lm have no such layout",
    "bfloat16": "mlx on a CPU rounds elsewhere",
}
EXEMPT = {
    **{("deepseek", what): why for what, why in NO_MLX.items()},
    ("deepseek_v2", "RouterPolicy.group_mask_fill"): "softmax scores are above 0",
    **{("deepseek_v32-dense", what): why for what, why in UNSEEN_INDEXER.items()},
}


def _indexed(**edits: Any) -> Edit:
    def of(mla: MLA) -> MLA:
        assert mla.indexer is not None and mla.indexer.rope is not None
        rope = replace(mla.indexer.rope, **edits)
        return replace(mla, indexer=replace(mla.indexer, rope=rope))

    return on_operators(MLA, of)


def _latent_eps(name: str) -> Edit:
    return on_operators(MLA, lambda m: replace(m, **{name: replace(getattr(m, name), eps=0.05)}))


MUTANTS = (
    Mutant("eps of the latent's norm", _latent_eps("latent_norm"), ("MLA.latent_norm",)),
    Mutant("eps of the queries' latent", _latent_eps("q_latent_norm"), ("MLA.q_latent_norm",)),
    Mutant("interleaved indexer", _indexed(style="interleaved"), (), ("deepseek_v32-sparse",)),
)
_YARN_40 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_scaling": None,
    },
    "deepseek_v2": {  # Lite
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {**_YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _YARN_40,
    },
}
PUBLISHED["deepseek_v32"] = {
    **PUBLISHED["deepseek_v3"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
PUBLISHED["kimi_k2"] = {
    **PUBLISHED["deepseek_v3"],
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
}
COUNTS = {
    "deepseek": (16.4, 2.6),
    "deepseek_v2": (15.7, 2.45),
    "deepseek_v3": (671.0, 36.6),
    "deepseek_v32": (671.9, 37.5),
    "kimi_k2": (1026.0, 31.7),
}
REFUSED_EDITS = (
    ("deepseek_v2-greedy", "q_lora_rank", 24, "self_attn.q_a_proj"),
    ("deepseek_v3-groups", "first_k_dense_replace", 2, "mlp.gate_proj"),
    ("deepseek_v3-groups", "kv_lora_rank", 8, "kv_lora_rank"),
    ("deepseek_v3-groups", "n_routed_experts", 16, "n_routed_experts 16"),
    ("deepseek_v3-groups", "n_shared_experts", 1, "shared_expert_intermediate_size"),
    ("deepseek_v32-sparse", "index_n_heads", 8, "index_n_heads"),
)
