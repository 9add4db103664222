"""Small checkpoint folders, and what holds for every error that opening one gives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moescope.engine.checkpoint import Checkpoint
from moescope.errors import MoescopeError
from moescope.safety import printable

CONFIG = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "clip_qkv": None,
    "eos_token_id": 256,
}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_model(folder: Path, config: Any = CONFIG, *, file: str = "model.safetensors") -> Path:
    """A folder with a config and one small shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.arange(12.0).reshape(3, 4)}, folder / file)
    return folder


def write_shards(folder: Path, index: Any = None) -> Path:
    """Two shards, and an index unless it is False."""
    write_model(folder, file=ONE)
    save_file({"v": torch.ones(5, dtype=torch.bfloat16)}, folder / TWO)
    if index is None:
        index = {"metadata": {"total_size": 58}, "weight_map": {"w": ONE, "v": TWO}}
    if index is not False:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def error_of(folder: Path | str, **arguments: Any) -> MoescopeError:
    """The error that opening gives, having checked what holds for every error."""
    started = time.monotonic()
    with pytest.raises(MoescopeError) as caught:
        Checkpoint.open(folder, **arguments)
    assert time.monotonic() - started < 2
    assert caught.value.message == printable(caught.value.message)
    assert "\n" not in caught.value.message
    return caught.value
