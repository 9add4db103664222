"""The text of Qwen3-VL-MoE and Qwen3-Omni: whole models with tiny other towers, fed with text."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_ROPE = {
    "rope_type": "default",
    "rope_theta": 500000.0,
    "mrope_section": [4, 4, 4],
    "mrope_interleaved": True,
}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {
        "num_local_experts": 8,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "rope_parameters": _ROPE,
    },
    "qwen3_omni_moe_text": {
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "rope_parameters": {**_ROPE, "rope_theta": 1000000.0},
    },
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "num_mel_bins": 16,
    "downsample_hidden_size": 16,
}


def _vision(config: Any, **options: Any) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    whole = Qwen3VLMoeConfig(
        text_config=config.to_dict(),
        vision_config={**_VISION, "out_hidden_size": config.hidden_size},
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return Qwen3VLMoeForConditionalGeneration._from_config(whole, **options)


def _omni(config: Any, **options: Any) -> Any:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker

    whole = Thinker.config_class(
        text_config=config.to_dict(),
        vision_config={**_VISION, "out_hidden_size": config.hidden_size},
        audio_config={**_AUDIO, "output_dim": config.hidden_size},
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return Thinker._from_config(whole, **options)


def _older(config: dict[str, Any]) -> None:
    config["num_experts"] = config.pop("num_local_experts")


OLDER = {"qwen3_vl_moe_text": _older}
CLASSES = {"qwen3_vl_moe_text": _vision, "qwen3_omni_moe_text": _omni}
CASES = (
    Case("qwen3_vl_moe_text", "released", 0),
    Case(
        "qwen3_vl_moe_text",
        "dense-steps",
        179,
        {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    ),
    Case("qwen3_omni_moe_text", "released", 0),
    Case(
        "qwen3_omni_moe_text",
        "not-renormalised",
        3,
        {"norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True},
    ),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
}
COUNTS = {"qwen3_vl_moe_text": (30.5, 3.04)}
