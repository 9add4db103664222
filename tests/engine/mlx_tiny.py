"""Tiny models in the MLX interpreter and, beside it, in torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moescope.engine.interpreter import StepOutput
from moescope.engine.load import load_model
from moescope.engine.mlx_decoder import MLXDecoder
from moescope.engine.protocol import LoadRequest
from moescope.engine.torch_decoder import TorchDecoder
from tests.families.kit import Case
from tests.oracle.harness import agrees
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 12))
# Those whose tiny models double rounding again and again: how much wider their tolerance is.
WIDER = {"qwen3_next": 4, "dbrx": 30}


def near_enough(family: str, seen: dict[str, Any]) -> bool:
    """Whether two runs (`harness.difference`) are one but for rounding."""
    wider = WIDER.get(family, 1)
    return agrees({k: v / wider if isinstance(v, float) else v for k, v in seen.items()})


def as_mlx_calls_gpt_oss(tensors: dict[str, Any]) -> dict[str, Any]:
    """Gate and up apart and turned, as mlx-lm publishes them."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            out[f"{base}.gate_proj.weight"] = tensor[:, :, ::2].swapaxes(1, 2)
            out[f"{base}.up_proj.weight"] = tensor[:, :, 1::2].swapaxes(1, 2)
        elif kind == "down_proj":
            out[f"{base}.down_proj.weight"] = tensor.swapaxes(1, 2)
        elif kind == "gate_up_proj_bias":
            out[f"{base}.gate_proj.bias"] = tensor[:, ::2]
            out[f"{base}.up_proj.bias"] = tensor[:, 1::2]
        elif kind == "down_proj_bias":
            out[f"{base}.down_proj.bias"] = tensor
        else:
            out[name] = tensor
    return out


def on_mlx(path: Path, *, lanes: int = 1, room: int = 64, dtype: str = "float32") -> MLXDecoder:
    model = load_model(LoadRequest(str(path), device="mlx", dtype=dtype)).interpreter
    assert isinstance(model, MLXDecoder)
    model.open(lanes, room)
    return model


def on_torch(path: Path, *, lanes: int = 1, room: int = 64, dtype: str = "float32") -> TorchDecoder:
    model = load_model(LoadRequest(str(path), device="cpu", dtype=dtype)).interpreter
    assert isinstance(model, TorchDecoder)
    model.open(lanes, room)
    return model


def checkpoint_of(case: Case, folder: Path, **options: Any) -> Path:
    return tiny_checkpoint(
        case.family, folder / case.id, seed=case.seed, **{**case.overrides, **options}
    )


@contextmanager
def compiling_in(folder: Path) -> Iterator[None]:
    """MLX's CPU keeps the libraries that it compiles below TMPDIR: not where another test does."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def fresh(folder: Path, family: str = "olmoe", lanes: int = 1, **options: Any) -> MLXDecoder:
    return on_mlx(tiny_checkpoint(family, folder), lanes=lanes, **options)


def same(a: StepOutput, b: StepOutput, lane_a: int, lane_b: int = 0, tolerance: float = 0) -> bool:
    """Whether two outputs say the same of two lanes, in every array."""
    return all(
        np.allclose(x[lane_a], getattr(b, name)[lane_b], rtol=0, atol=tolerance, equal_nan=True)
        for name in a.__dataclass_fields__
        if isinstance(x := getattr(a, name), np.ndarray)
    )
