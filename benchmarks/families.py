"""Families beyond the usual shapes: a token in C against the torch operators, as a ratio.

Models are one or a few layers in published shapes, with fewer experts and a smaller vocabulary
where the whole would not fit a small machine; K and all widths are real. See `engine_families.py`.
"""

from __future__ import annotations

from typing import Any

import measure
from asked import Asked
from child import Child

Figures = dict[str, Any]
VOCABULARY = 16384
_DEEPSEEK: Figures = {
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 16,  # of 256
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
}
_GPT_OSS: Figures = {
    "model_type": "gpt_oss",
    "vocab_size": VOCABULARY,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "rope_theta": 150000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN3_NEXT: Figures = {
    "model_type": "qwen3_next",
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "num_experts": 128,  # of 512
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "rope_theta": 10000000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CASES = {
    "gpt-oss, 2 layers": _GPT_OSS,
    "DeepSeek-V3, 1 layer of 16 experts": _DEEPSEEK,
    "Qwen3-Next, 4 layers of 128 experts": _QWEN3_NEXT,
}
KEYS = ("step_ms", "torch_ms", "faster")


def run(asked: Asked) -> Figures:
    found: Figures = {}
    for name, config in CASES.items():
        with Child("engine_families.py", threads=asked.threads) as child:
            child.ask("load", threads=asked.threads)
            said = child.ask("case", config=config, prompt=asked.prompt, tokens=asked.tokens)
            turns = measure.rounds(
                {name: lambda child=child: child.ask("time", tokens=asked.tokens, skip=asked.skip)},
                asked,
            )
        found[name] = {**said, **measure.medians(turns, name, KEYS)}
    return {"cases": found}
