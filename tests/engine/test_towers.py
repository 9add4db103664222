"""Text towers: whole vision and omni models as transformers builds and saves them, on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from tests.engine.layout_writers import LAYOUTS, apart, as_mlx
from tests.engine.test_layouts import read, same
from tests.tiny import fill, older_names, tiny_fields, write_tokenizer

# whole's type -> (its class in transformers, the family of its text, what the text's config says)
WHOLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_moe",
        {"model_type": "qwen3_vl_moe_text"},
    ),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "qwen3_moe",
        {"model_type": "qwen3_omni_moe_text", "norm_topk_prob": False},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", {}),
    "gemma4": ("Gemma4ForConditionalGeneration", "gemma4_text", {}),
    "llama4": ("Llama4ForConditionalGeneration", "llama4_text", {}),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral4", {}),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", "deepseek_v3", {}),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl_text", {}),
    "aria": ("AriaForConditionalGeneration", "aria_text", {}),
    "internvl": ("InternVLForConditionalGeneration", "qwen3_moe", {}),
    "nemotron_h_omni": ("NemotronH_Omni_Reasoning_V3", "nemotron_h", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", "step3p5", {}),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        "glm4_moe",
        {
            "model_type": "glm4v_moe_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 2, 2],
            },
        },
    ),
}
_SMALL = {
    **{"depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32},
    **{"num_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    **{"out_hidden_size": 64, "vision_output_dim": 64, "projector_input_dim": 64},
    **{"projector_output_dim": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    **{"encoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 32, "encoder_attention_heads": 2},
}


def whole_model(name: str) -> Any:
    """A tiny model with all its towers, float32."""
    import transformers

    class_name, family, text = WHOLES[name]
    built = getattr(transformers, class_name)
    fields = {"model_type": family, **tiny_fields(family), **text, "eos_token_id": 256}
    config = built.config_class(text_config=fields)
    for tower in ("vision_config", "audio_config"):
        inner = getattr(config, tower, None)
        for key, value in _SMALL.items() if inner is not None else ():
            if hasattr(inner, key):
                setattr(inner, key, value)
    model = built._from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    fill(model, family, 0)
    return model


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    path = folder / "model.safetensors"
    # transformers 5.23 gives the text's layers of Kimi-K2.5 the name of the vision tower's
    text = "language_model.model."
    tensors = load_file(path).items()
    save_file({n.replace(f"{text}blocks.", f"{text}layers."): t for n, t in tensors}, path)


@pytest.mark.parametrize("name", WHOLES)
def test_logits_of_a_text_tower(name: str, tmp_path: Path) -> None:
    model = whole_model(name)
    save(model, tmp_path)
    ids = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()
    loaded = load_model(LoadRequest(str(tmp_path), device="cpu", dtype="float32"))
    found = loaded.interpreter.run([0], ids.numpy(), all_logits=True)
    np.testing.assert_allclose(found.logits[0], expected, atol=1e-4, rtol=0)
    text = WHOLES[name][2].get("model_type", WHOLES[name][1])
    assert loaded.facts["model_type"] == name
    assert loaded.facts["notes"][0] == (
        f"{name}: only its text model ({text}) is loaded; images and sound are not read"
    )
    assert not any("not read, config.json" in note for note in loaded.facts["notes"])


# whole's type, of those mlx-lm knows -> its experts as published, where transformers saves others
ON_MLX = {
    "qwen3_vl_moe": "fused, transposed",
    "qwen3_5_moe": "fused",
    **dict.fromkeys(("gemma4", "llama4", "mistral3", "kimi_k25", "minimax_m3_vl"), ""),
}


@pytest.mark.parametrize("name", ON_MLX)
def test_a_text_tower_as_published_and_as_mlx_lm_has_it(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save(whole_model(name), whole)
    older_names(whole / "config.json")
    expected, _ = read(whole)
    path = whole / "model.safetensors"
    if ON_MLX[name]:
        tensors = LAYOUTS[ON_MLX[name]](apart(load_file(path)))
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        same(read(whole)[0], expected)
    on_mlx, inspected = read(as_mlx(whole, tmp_path / "mlx"))
    assert all(layout.startswith("mlx-lm") for layout in inspected.plan.layouts)
    assert inspected.plan.unexpected == ()
    for target, tensor in expected.items():
        # norms that hold w of 1 + w have lost what 1 + w does not hold
        torch.testing.assert_close(on_mlx[target], tensor, atol=1.2e-7, rtol=0)
