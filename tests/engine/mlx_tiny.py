"""Tiny models in the MLX interpreter and, beside it, in torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.engine.load import load_model
from moescope.engine.mlx_decoder import MLXDecoder
from moescope.engine.protocol import LoadRequest
from moescope.engine.torch_decoder import TorchDecoder
from tests.families.kit import Case
from tests.tiny import tiny_checkpoint


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
