"""`moescope inspect`: what it says, that it fits the terminal, and that it costs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.commands.inspect import page
from moescope.engine import load
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.describe import describe
from moescope.engine.families import SUPPORTED
from moescope.engine.layer_words import spans
from moescope.engine.protocol import LoadRequest
from moescope.errors import MoescopeError
from tests.engine.packed_forms import FORMS
from tests.engine.test_quantised_checkpoints import SHAPE, edit, stacked
from tests.families import PUBLISHED
from tests.tiny import tiny_checkpoint


def facts_of(folder: Path) -> dict[str, Any]:
    with Checkpoint.open(folder, weights=False) as checkpoint:
        return describe(checkpoint)


def of_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return facts_of(folder)


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_pages_of_published_configs_fit(family: str, tmp_path: Path) -> None:
    facts = of_config(PUBLISHED[family], tmp_path / family)
    for width in (60, 80, 100):
        lines = list(page(facts, width))
        assert max(map(len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)
    text = "\n".join(page(facts, 80))
    assert SUPPORTED[facts["model_type"]].title in text and "none in this folder" in text
    numbers = sorted(number for row in facts["layers"] for number in row["numbers"])
    assert numbers == list(range(facts["num_layers"]))
    assert json.loads(json.dumps(facts)) == facts


def test_a_page(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2_moe", tmp_path, decoder_sparse_step=2, dtype="bfloat16")
    name = folder.name
    assert (
        "\n".join(page(facts_of(folder), 80))
        == f"""\
model       {name}
family      Qwen2-MoE (qwen2_moe)
parameters  248 k, 154 k for each token (62%)
sizes       hidden 64, vocabulary 264, context 256
weights     496.0 kB in 1 shard; hub, one tensor per expert
stored as   bfloat16

layers
  0, 2  attention 4×16, kv 2  dense 48
  1, 3  attention 4×16, kv 2  3 of 8 experts × 40, shared 56 gated

router      softmax → top-3, not renormalised · 1 shared expert, sigmoid gate
fields      num_experts_per_tok 3 · num_experts 8 · shared_experts 1 ·
            shared_expert_gate sigmoid
stored as   bfloat16

memory needed                 float32   bfloat16    float16
  cpu, cuda                    1.3 MB   627.1 kB   627.1 kB
  mlx                          1.3 MB   627.1 kB   627.1 kB
    cache, 256 tokens        262.1 kB   131.1 kB   131.1 kB
  read for each token        617.5 kB   308.7 kB   308.7 kB"""
    )


def test_packed_weights(tmp_path: Path) -> None:
    """What routers are stored in, what expanding costs, and what stays packed on MLX."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path, layout="mlx", **SHAPE)
    stacked(folder, FORMS["mlx-4-bit-g32"], FORMS["mlx-8-bit-g64"])
    edit(folder, quantization={"group_size": 32, "bits": 4})
    facts = facts_of(folder)
    assert facts["router_stored_as"] == "8-bit affine g64" and facts["quantisation"] == "mlx"
    assert [kind["as"] for kind in facts["stored"]] == [
        "float32",
        "4-bit affine g32",
        "8-bit affine g64",
    ]
    assert sum(kind["parameters"] for kind in facts["stored"]) == facts["parameters"]
    assert sum(kind["bytes"] for kind in facts["stored"]) == facts["weights_bytes"]
    packed = sum(kind["parameters"] for kind in facts["stored"][1:])
    held = sum(kind["bytes"] for kind in facts["stored"][1:])
    assert facts["packed_bytes"] == held and facts["packed_expanded"]["bfloat16"] == 2 * packed
    needed = facts["memory_needed"]
    assert needed["cpu"]["float32"] - needed["mlx"]["float32"] == 4 * packed - held
    experts = facts["stored"][1]["bytes"]
    unread = experts // 3 + 4 * (264 - 1) * SHAPE["hidden_size"]  # of 3 experts 2; of the table 1
    assert facts["bytes_per_token"]["stored"] == facts["weights_bytes"] - unread
    text = " ".join(" ".join(page(facts, 80)).split())
    assert "torch expands them" in text and "MLX multiplies them packed" in text
    found = load.inspect(LoadRequest(str(folder), device="cpu", dtype="bfloat16"))
    found.checkpoint.close()
    assert found.facts["router_stored_as"] == "8-bit affine g64"
    wanted = found.memory["weights"] + found.memory["cache"]
    assert needed["cpu"]["bfloat16"] == wanted


def test_routers_of_several_dtypes(tmp_path: Path) -> None:
    folder = tiny_checkpoint("olmoe", tmp_path)
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    save_file({**held, name: held[name].to(torch.bfloat16)}, folder / "model.safetensors")
    assert facts_of(folder)["router_stored_as"] == "float32 (3), bfloat16 (1)"


def test_a_config_alone_says_how_weights_are_packed(tmp_path: Path) -> None:
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    facts = of_config({**PUBLISHED["qwen3_moe"], "quantization_config": block}, tmp_path)
    assert facts["quantisation"] == "FP8" and facts["stored"] is None
    assert "none in this folder; the config says FP8" in "\n".join(page(facts))
    assert any("made for FP8 activations" in note for note in facts["notes"])
    with pytest.raises(MoescopeError, match="quant_method: expected one of"):
        of_config(
            {**PUBLISHED["qwen3_moe"], "quantization_config": {"quant_method": "x"}}, tmp_path
        )


def test_towers(tmp_path: Path) -> None:
    """The text model of a vision checkpoint, and what its note says."""
    text = dict(PUBLISHED["qwen3_moe"])
    whole = {"model_type": "some_vl", "text_config": text, "tie_word_embeddings": True}
    facts = of_config(whole, tmp_path)
    assert facts["model_type"] == "some_vl" and facts["family"] == "Qwen3-MoE"
    assert facts["parameters"] < of_config(text, tmp_path / "text")["parameters"], "tied"
    assert facts["notes"][1:] == [
        "some_vl: only its text model (qwen3_moe) is loaded; images and sound are not read"
    ]
    inner = of_config({"model_type": "omni", "thinker_config": whole}, tmp_path)
    assert inner["family"] == "Qwen3-MoE"
    with pytest.raises(MoescopeError, match=r"text_config\.num_experts_per_tok: expected"):
        of_config({**whole, "text_config": {**text, "num_experts_per_tok": 0}}, tmp_path)
    with pytest.raises(MoescopeError, match="qwen4_exp_text: hyper-connection"):
        of_config({**whole, "text_config": {"model_type": "qwen4_exp_text"}}, tmp_path)


def test_spans() -> None:
    assert spans([0]) == "0" and spans([0, 1, 2, 7]) == "0-2, 7"
    assert spans([0, 2, 4]) == "0, 2, 4" and spans([3, 7, 11, 15]) == "3, 7 … 15"
    assert spans([0, 1, 3, 4, 6, 7, 9]) == "0-1, 3-4 … 9"


def test_inspecting_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from moescope import cli; cli.run(['inspect', 'demo']);"
        "print(sorted({'torch', 'mlx', 'textual'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_layers_that_clamp_and_tokens_that_no_expert_sees(tmp_path: Path) -> None:
    facts = of_config(PUBLISHED["step3p5"], tmp_path / "step")
    rows = {row["layers"]: row["feed_forward"] for row in facts["layers"]}
    assert rows["0"] == "dense 11264" and len(rows) == 6
    assert rows["43"] == "8 of 288 experts × 1280 clamped 7, shared 1280"
    assert rows["44"] == "8 of 288 experts × 1280 clamped 7, shared 1280 clamped 16"
    assert "197 G, 11.5 G for each token" in list(page(facts))[2]
    facts = of_config(PUBLISHED["longcat_flash"], tmp_path / "longcat")
    assert list(page(facts))[2] == "parameters  561 G, at most 31.4 G for each token (6%)"
