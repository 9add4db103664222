"""Step-3.5, and the text of Step-3.7: whole models with a tiny vision tower, fed with text."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

_TYPES = ["full_attention", "sliding_attention"] * 2
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
    "original_max_position_embeddings": 32,
}
TINY: dict[str, dict[str, Any]] = {
    "step3p5": {
        "pad_token_id": 0,
        "n_routed_experts": 8,
        "moe_intermediate_size": 40,
        "share_expert_dim": 56,
        "head_dim": 24,
        "sliding_window": 6,
        "layer_types": _TYPES,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 1.0,
    "image_size": 28,
}


def _whole(config: Any, **options: Any) -> Any:
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    whole = Step3p7Config(text_config=config.to_dict(), vision_config=_VISION)
    return Step3p7ForConditionalGeneration._from_config(whole, **options)


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """Norms hold w of 1 + w."""
    if name.endswith("norm.weight"):
        return 0.25 * noise
    return 0.3 * noise if name.endswith("correction_bias") else None


def _older(config: dict[str, Any]) -> None:
    """The published names, with lists that go on for a layer that predicts ahead."""
    every = config.pop("rope_parameters")
    types = config["layer_types"] = [*config["layer_types"], "full_attention"]
    ropes = [every[kind] for kind in types]
    config["rope_theta"] = [rope["rope_theta"] for rope in ropes]
    config["partial_rotary_factors"] = [rope.get("partial_rotary_factor", 1.0) for rope in ropes]
    scaling = {name: value for name, value in ropes[0].items() if name in _LLAMA3}
    config["rope_scaling"] = scaling if len(scaling) > 1 else None
    config["yarn_only_types"] = ["full_attention"]
    sparse = enumerate(config.pop("mlp_layer_types"))
    config["moe_layers_enum"] = ",".join(str(n) for n, kind in sparse if kind == "sparse")
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        config[name] = [*(config[name] or [0.0] * (len(types) - 1)), 0.0]
    config["num_nextn_predict_layers"] = 1
    config["attention_other_setting"] = {
        "attention_type": "sliding_attention",
        "num_attention_heads": config.pop("num_sliding_attention_heads"),
        "num_attention_groups": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
    }
    for name in ("per_layer_config", "mtp_layer_types"):
        config.pop(name, None)
    config["moe_num_experts"] = config.pop("n_routed_experts")
    config["moe_top_k"] = config.pop("num_experts_per_tok")
    config["num_attention_groups"] = config.pop("num_key_value_heads")


OLDER = {"step3p5": _older}
INIT = {"step3p5": _init}
CLASSES = {"step3p5": _whole}
CASES = (
    Case(
        "step3p5",
        "released",
        0,
        {
            "num_sliding_attention_heads": 6,
            "moe_router_scaling_factor": 3.0,
            "swiglu_limits": [0.0, 0.0, 0.5, 0.4],
            "swiglu_limits_shared": [0.4, 0.0, 0.3, 0.0],
            "rope_parameters": {
                "full_attention": {**_LLAMA3, "rope_theta": 5e6, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    Case(
        "step3p5",
        "biases",
        0,
        {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_hidden_layers": 3,
            "mlp_layer_types": ["sparse"] * 3,
            "num_attention_heads": 6,
            "num_sliding_attention_heads": 2,
            "query_pre_attn_scalar": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "num_experts_per_tok": 2,
        },
    ),
)
EXEMPT = {("step3p5-biases", "RouterPolicy.scale_site"): "the factor is 1"}
REFUSED_EDITS = (
    ("step3p5-released", "per_layer_config", {}, "layer 1 q_proj.weight has 144 rows"),
    ("step3p5-released", "share_expert_dim", 40, "share_expert_dim"),
    ("step3p5-released", "num_key_value_heads", 4, "num_key_value_heads"),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "step3p5": {
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "max_seq_len": 262144,
        "max_position_embeddings": 262144,
        "vocab_size": 128896,
        "torch_dtype": "bfloat16",
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "use_moe": True,
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "att_impl_type": "GQA",
        "num_nextn_predict_layers": 3,
        "rope_theta": [5e6, 1e4, 1e4, 1e4] * 12,
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 131072},
        "yarn_only_types": ["full_attention"],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0] * 12,
        "use_head_wise_attn_gate": True,
        "sliding_window": 512,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12,
        "use_rope_layers": [],
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 96,
            "num_attention_groups": 8,
            "head_dim": 128,
            "true_head_dim": 128,
        },
        "swiglu_limits": [0.0] * 43 + [7, 7] + [0.0] * 3,
        "swiglu_limits_shared": [0.0] * 44 + [16] + [0.0] * 3,
        "zero_centered": True,
    }
}
COUNTS = {"step3p5": (196.8, 11.46)}  # 11 by the model's card: without its head
