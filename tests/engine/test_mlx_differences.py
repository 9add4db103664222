"""Where mlx-lm computes something else than transformers: moescope on MLX is on transformers' side.

Each case first shows that the three agree without the key in question, so that what follows is that
key's doing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engine.mlx_tiny import compiling_in, on_mlx
from tests.tiny import save_checkpoint, tiny_model

IDS = np.random.default_rng(4).integers(0, 256, (1, 20))
AGREES, DIFFERS = 2e-4, 0.05

# (family, config fields both have, the one that mlx-lm passes over)
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("olmoe", {}, {"clip_qkv": 0.75}),
    ("mixtral", {}, {"sliding_window": 8}),
    ("qwen2_moe", {}, {"norm_topk_prob": True}),
)
# What mlx-lm cannot even load, because it makes a router of every layer.
NOT_LOADED = ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2})


@pytest.fixture(scope="module", autouse=True)
def _compiled_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with compiling_in(tmp_path_factory.mktemp("compiled")):
        yield


def in_transformers(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(torch.as_tensor(IDS)).logits[0].numpy())


def in_mlx_lm(path: Path) -> NDArray[np.float32]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    return np.array(model(mx.array(IDS))[0])


def in_moescope(path: Path) -> NDArray[np.float32]:
    return on_mlx(path).run([0], IDS, all_logits=True).logits[0]


def off(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max())


def checkpoint(model: Any, folder: Path) -> Path:
    """As mlx-lm publishes it: its own tensor names, and a config that its loader understands."""
    path = save_checkpoint(model, folder, layout="mlx", dialect="hub")
    config = json.loads((path / "config.json").read_text())
    if config["model_type"] == "mixtral":
        config["num_local_experts"] = config.pop("num_experts", config.get("num_local_experts"))
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("family", "shared", "key"), CASES, ids=[c[0] for c in CASES])
def test_moescope_does_what_transformers_does(
    family: str, shared: dict[str, Any], key: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **shared)
    path = checkpoint(model, tmp_path / "without")
    wanted = in_transformers(model)
    assert off(in_moescope(path), wanted) < AGREES
    assert off(in_mlx_lm(path), wanted) < AGREES
    model = tiny_model(family, **shared, **key)
    path = checkpoint(model, tmp_path / "with")
    wanted = in_transformers(model)
    assert off(in_moescope(path), wanted) < AGREES
    assert off(in_mlx_lm(path), wanted) > DIFFERS


@pytest.mark.parametrize("key", NOT_LOADED, ids=lambda key: next(iter(key)))
def test_moescope_runs_what_mlx_lm_does_not_load(key: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", **key)
    path = checkpoint(model, tmp_path / "with")
    assert off(in_moescope(path), in_transformers(model)) < AGREES
    with pytest.raises(ValueError):
        in_mlx_lm(path)
