"""Where mlx-lm computes something else than transformers: moescope on MLX is on transformers' side.

Every row shows three things of one tiny checkpoint: moescope does what transformers does; mlx-lm
does not; and moescope does what mlx-lm does once its decoder is made wrong in that one way, so that
the way is the whole difference. L1 to L8 are the rows of the list of known differences.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moescope.engine import load, mlx_weights
from moescope.engine.mlx_decoder import MLXDecoder
from moescope.engine.operators import Attention, StateSpace
from moescope.engine.protocol import LoadRequest
from tests.engine.mlx_tiny import as_mlx_calls_gpt_oss, on_mlx
from tests.families.kit import Edit, on_attention, on_operators, policy
from tests.oracle.matrix import BY_ID
from tests.tiny import save_checkpoint, tiny_model

IDS = np.random.default_rng(4).integers(0, 256, (1, 20))
AGREES, DIFFERS = 2e-4, 2e-3
Logits = NDArray[np.float32]


def leave(model: Any) -> None:
    pass


def same_config(config: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Row:
    """`wrong` makes a decoder that does what mlx-lm does. `prepare` changes the model's tensors,
    `config` that of mlx-lm's checkpoint, `tensors` its tensors."""

    family: str
    wrong: Edit
    overrides: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = leave
    config: Callable[[dict[str, Any]], None] = same_config
    tensors: Callable[[dict[str, Any]], dict[str, Any]] = dict
    layout: str = "hub"


def negative_biases(model: Any) -> None:
    """Correction biases that leave many admissible experts below 0."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(-1.2 * torch.rand(tensor.shape, generator=generator))


def slow_steps(model: Any) -> None:
    """State-space layers whose step sizes are below `time_step_min`."""
    for name, tensor in model.named_parameters():
        if name.endswith("dt_bias"):
            with torch.no_grad():
                tensor.copy_(-8.0 + 0.5 * tensor)


def as_mlx_calls_hunyuan(config: dict[str, Any]) -> None:
    topk = config["moe_topk"]
    config |= {
        "model_type": "hunyuan",
        "moe_topk": topk[0] if isinstance(topk, list) else topk,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    }


def _whole_turns(attention: Attention) -> Attention:
    rope = attention.rope
    assert rope is not None and rope.scaling is not None
    scaling = replace(rope.scaling, truncate=True)
    return replace(attention, rope=replace(rope, scaling=scaling))


def of_case(name: str) -> dict[str, Any]:
    return BY_ID[name].overrides


ROWS: dict[str, Row] = {
    "L1 deepseek_v3: masked groups": Row(
        "deepseek_v3",
        policy(group_mask_fill="0"),
        of_case("deepseek_v3-groups"),
        negative_biases,
    ),
    "L1 nemotron_h: masked groups": Row(
        "nemotron_h",
        policy(group_mask_fill="0"),
        of_case("nemotron_h-grouped"),
        negative_biases,
    ),
    "L2 ernie4_5_moe: correction bias": Row(
        "ernie4_5_moe", policy(correction_bias="none"), of_case("ernie4_5_moe-released")
    ),
    "L3 hunyuan: renormalisation": Row(
        "hunyuan_v1_moe",
        policy(norm_topk_prob=False),
        {**of_case("hunyuan_v1_moe-released"), "head_dim": 16, "tie_word_embeddings": True},
        config=as_mlx_calls_hunyuan,
    ),
    "L4 jamba: renormalisation": Row(
        "jamba", policy(norm_topk_prob=True), of_case("jamba-released")
    ),
    "L5 olmoe: clip_qkv": Row(
        "olmoe",
        on_attention(lambda a: replace(a, clip_qkv=None)),
        {"clip_qkv": 0.75},
        layout="mlx",
    ),
    "L6 gpt_oss: YaRN's range": Row(
        "gpt_oss",
        on_attention(_whole_turns),
        {"swiglu_limit": 7.0},  # which mlx-lm takes whatever the config says
        tensors=as_mlx_calls_gpt_oss,
        layout="fused",
    ),
    "L7 mixtral: sliding_window": Row(
        "mixtral",
        on_attention(lambda a: replace(a, window=0)),
        {"sliding_window": 8},
        layout="mlx",
    ),
    "L8 nemotron_h: time_step_min": Row(
        "nemotron_h",
        on_operators(StateSpace, lambda s: replace(s, dt_floor=0.0)),
        of_case("nemotron_h-latent"),
        slow_steps,
    ),
    "qwen2_moe: norm_topk_prob": Row(
        "qwen2_moe", policy(norm_topk_prob=False), {"norm_topk_prob": True}, layout="mlx"
    ),
}
# What mlx-lm cannot even load, because it makes a router of every layer.
NOT_LOADED = ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2})


def in_transformers(model: Any) -> Logits:
    with torch.no_grad():
        return np.asarray(model(torch.as_tensor(IDS)).logits[0].numpy())


def in_mlx_lm(path: Path) -> Logits:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    mx.disable_compile()  # functions of mlx-lm's that would each call a C++ compiler
    try:
        return np.array(model(mx.array(IDS))[0])
    finally:
        mx.enable_compile()


def in_moescope(path: Path, edit: Edit = lambda spec: spec) -> Logits:
    found = load.inspect(LoadRequest(str(path), device="mlx", dtype="float32"))
    with found.checkpoint:
        weights, _ = mlx_weights.read(found, lambda event: None)
    model = MLXDecoder(edit(found.spec), weights, dtype="float32")
    model.open(1, 32)
    return model.run([0], IDS, all_logits=True).logits[0]


def off(a: Logits, b: Logits) -> float:
    return float(np.abs(a - b).max())


def for_mlx_lm(row: Row, path: Path, folder: Path) -> Path:
    """The checkpoint as mlx-lm's loader wants it."""
    import mlx.core as mx

    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    row.config(config)
    (folder / "config.json").write_text(json.dumps(config))
    shard = str(folder / "model.safetensors")
    mx.save_safetensors(shard, row.tensors(mx.load(shard)), {"format": "mlx"})
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_moescope_does_what_transformers_does(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    model = tiny_model(row.family, seed=1, **row.overrides)
    row.prepare(model)
    path = save_checkpoint(model, tmp_path / "hub", layout=row.layout, dialect="hub")
    wanted = in_transformers(model)
    theirs = in_mlx_lm(for_mlx_lm(row, path, tmp_path / "mlx"))
    assert off(in_moescope(path), wanted) < AGREES
    assert off(theirs, wanted) > DIFFERS
    assert off(in_moescope(path, row.wrong), theirs) < AGREES


@pytest.mark.parametrize("key", NOT_LOADED, ids=lambda key: next(iter(key)))
def test_moescope_runs_what_mlx_lm_does_not_load(key: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", **key)
    path = save_checkpoint(model, tmp_path / "with", layout="mlx", dialect="hub")
    found = on_mlx(path).run([0], IDS, all_logits=True).logits[0]
    assert off(found, in_transformers(model)) < AGREES
    with pytest.raises(ValueError):
        in_mlx_lm(path)
