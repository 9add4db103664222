"""Every published layout of a family loads to the same numbers as its hub checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.engine import load, torch_weights
from moescope.engine.protocol import LoadRequest
from tests.engine import packing
from tests.engine.layout_writers import LAYOUTS, as_mlx, known_to_mlx, older_hunyuan, text_alone
from tests.families import SAME, TINY
from tests.tiny import save_checkpoint, tiny_checkpoint, tiny_model

# transformers has matrices for experts that are identities, which nobody publishes.
WITH_IDENTITIES = {"longcat_flash"}
# Of these mlx-lm's code starts from quantised tensors alone.
FROM_PACKED = {"gpt_oss"}
# mlx-lm does without these tensors.
LEFT_OUT = {"ernie4_5_moe": "gate.correction_bias"}
# Below a layer, where hubs have the experts of a family; all others have HUB. transformers saves
# some text models as it holds them, if they are alone: how hubs have those is `test_towers`'.
HUB = "mlp.experts.0.gate_proj.weight"
FUSED, LINEAR = "mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"
LETTERS = "block_sparse_moe.experts.0.w1.weight"
HUB_EXPERTS = {
    "aria_text": "mlp.experts.fc1.weight",
    "dbrx": "ffn.experts.mlp.w1",
    "gemma4_text": "experts.gate_up_proj",
    "gpt_oss": FUSED,
    "jamba": "feed_forward.experts.0.gate_proj.weight",
    "jetmoe": "mlp.input_linear.weight",
    "lfm2_moe": "feed_forward.experts.0.w1.weight",
    "llama4_text": "feed_forward.experts.gate_up_proj",
    "minimax_m3_vl_text": FUSED,
    "mistral4": FUSED,
    "nemotron_h": "mixer.experts.0.up_proj.weight",
    "qwen3_vl_moe_text": FUSED,
    "step3p5": "moe.gate_proj.weight",
    "zaya": FUSED,
    "granitemoe_swa": "block_sparse_moe.experts.gate_up_proj",
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared"), LINEAR),
    **dict.fromkeys(("kimi_linear", "minimax_m2", "mixtral", "phimoe"), LETTERS),
}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], load.Inspected]:
    found = load.inspect(LoadRequest(str(folder), device="cpu", dtype="float32"))
    try:
        return torch_weights.read(found, lambda event: None)[0], found
    finally:
        found.checkpoint.close()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for target, tensor in expected.items():
        assert torch.equal(found[target], tensor), target


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_model(layout: str, qwen3: Path, tmp_path: Path) -> None:
    hub, _ = read(qwen3)
    (tmp_path / "config.json").write_text((qwen3 / "config.json").read_text())
    tensors = LAYOUTS[layout](load_file(qwen3 / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    found, inspected = read(tmp_path)
    same(found, hub)
    assert len(inspected.plan.layouts) == 1 and inspected.plan.unexpected == ()
    assert len(inspected.plan.unused) == (5 if "towers" in layout else 0)


@pytest.mark.parametrize("family", sorted(TINY))
def test_layouts_of_every_family(family: str, tmp_path: Path) -> None:
    """As hubs have it, as transformers 5 holds it, as mlx-lm writes it."""
    model, named = tiny_model(family), family if family in SAME else ""
    hub, inspected = read(save_checkpoint(model, tmp_path / "hub", dialect="hub", model_type=named))
    assert inspected.plan.unexpected == () or family in WITH_IDENTITIES
    wanted = f".{HUB_EXPERTS.get(family, HUB)}"
    assert any(name.endswith(wanted) for name in inspected.checkpoint.tensors)
    if family not in WITH_IDENTITIES:
        fused = save_checkpoint(model, tmp_path / "fused", layout="fused", model_type=named)
        same(read(fused)[0], hub)
    plain = tmp_path / "hub"
    if "text_config" in json.loads((plain / "config.json").read_text()):
        plain = text_alone(plain, tmp_path / "text")
        same(read(plain)[0], hub)
    if known_to_mlx(family) and family not in FROM_PACKED:
        found, inspected = read(as_mlx(plain, tmp_path / "mlx"))
        for target, tensor in hub.items():
            if target.endswith(LEFT_OUT.get(family, "nothing")):
                assert not found[target].any() and "0 throughout" in inspected.plan.notes()[0]
                continue
            # norms that hold w of 1 + w have lost what 1 + w does not hold
            torch.testing.assert_close(found[target], tensor, atol=1.2e-7, rtol=0)


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """MXFP4, [E, out, in], rows of gate and up in turn; beside it the same numbers as transformers
    saves them: [E, in, out], columns in turn."""
    folder = tiny_checkpoint("gpt_oss", tmp_path, intermediate_size=64, hidden_size=64)
    path = folder / "model.safetensors"
    plain = load_file(path)
    published: dict[str, Any] = {}
    for number, (name, tensor) in enumerate(sorted(plain.items())):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            published[name] = tensor
            continue
        rows, columns = tensor.shape[2], tensor.shape[1]
        made = [
            packing.gpt_oss(np.random.default_rng([number, expert]), rows, columns)
            for expert in range(len(tensor))
        ]
        for suffix in ("_blocks", "_scales"):
            published[name + suffix] = torch.stack([tensors[suffix] for tensors, _ in made])
        plain[name] = torch.stack([values.T for _, values in made]).contiguous()
    save_file(plain, path)
    expected, _ = read(folder)
    save_file(published, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    found, inspected = read(folder)
    same(found, expected)
    assert inspected.plan.layouts == ("gpt-oss, rows of gate and up alternate",)
    assert inspected.plan.unused == ()


def test_the_text_tower_of_a_vision_checkpoint(tmp_path: Path) -> None:
    """Its own type in `text_config`, its names below the whole's; as mlx-lm has it, too."""
    hub = tiny_checkpoint("qwen3_5_moe_text", tmp_path)
    expected, _ = read(hub)
    whole = tmp_path / "whole"
    whole.mkdir()
    text = json.loads((hub / "config.json").read_text())
    text |= {"full_attention_interval": 4, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    text |= {"rope_parameters": None, "num_experts": text.get("num_local_experts", 8)}
    config = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 1}}
    (whole / "config.json").write_text(json.dumps(config))
    tensors = LAYOUTS["fused"](load_file(hub / "model.safetensors"))  # as it is published
    tensors = LAYOUTS["model.language_model, with other towers"](tensors)
    save_file(tensors, whole / "model.safetensors")
    found, inspected = read(whole)
    same(found, expected)
    assert len(inspected.plan.unused) == 5 and inspected.plan.unexpected == ()
    assert inspected.notes()[0].startswith("qwen3_5_moe: only its text model (qwen3_5_moe_text)")
    on_mlx, inspected = read(as_mlx(whole, tmp_path / "mlx"))
    names = set(inspected.checkpoint.tensors)
    assert "language_model.model.layers.0.mlp.switch_mlp.up_proj.weight" in names
    for target, tensor in expected.items():
        torch.testing.assert_close(on_mlx[target], tensor, atol=1.2e-7, rtol=0)


def test_hunyuan_as_it_was_first_published(tmp_path: Path) -> None:
    folder = tiny_checkpoint("hunyuan_v1_moe", tmp_path)
    expected, _ = read(folder)
    path = folder / "model.safetensors"
    save_file(older_hunyuan(load_file(path), kv_heads=2), path)
    found, inspected = read(folder)
    same(found, expected)
    assert inspected.plan.layouts == ("hub, up and gate of an expert in one tensor",)
    assert inspected.plan.unused == ()
