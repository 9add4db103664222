"""DeepSeek-V2, -V3 and -V3.2, and Kimi-K2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.decoder import MLA
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
    what: "every token is seen"
    for name in ("MLA.indexer", "Indexer.topk", "Indexer.rope", "Norm.kind", "Norm.bias")
    for what in (name, f"{name}: none", f"{name}: another", f"{name}: one more")
}
NO_MLX = {
    "fused": "the models of mlx-lm have no such layout",
    "bfloat16": "mlx on a CPU rounds elsewhere",
}
EXEMPT = {
    **{("deepseek", what): why for what, why in NO_MLX.items()},
    ("deepseek_v2", "RouterPolicy.group_mask_fill"): "softmax scores are above 0",
    ("deepseek_v2", "RouterPolicy.group_mask_fill: another"): "softmax scores are above 0",
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
