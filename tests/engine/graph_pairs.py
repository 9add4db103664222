"""Decoders of tiny checkpoints, of families that kernels do whole: with the fused step, and not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

if os.environ.get("TRITON_INTERPRET"):
    import tests.kernels.interpreted  # noqa: F401

from moescope.engine import sampling
from moescope.engine.graph_step import GraphStep
from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.lane import policies_of
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest, Sampling
from moescope.engine.torch_decoder import TorchDecoder
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 12))
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "flex_olmo": {},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {},
    "mixtral": {"sliding_window": 4},
}
GREEDY, WARM = Sampling(), Sampling(temperature=1.5, seed=4)


@cache
def loaded(folder: Path, family: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The spec of a tiny model, and its weights."""
    path = tiny_checkpoint(family, folder, num_hidden_layers=2, **FAMILIES[family])
    model = load_model(LoadRequest(str(path), device=device, dtype=dtype)).interpreter
    assert isinstance(model, TorchDecoder)
    return model.spec, model.shared.weights


def pair(
    folder: Path,
    family: str = "olmoe",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    lanes: int = 1,
    capacity: int = 64,
    graph: bool = False,
    run_ahead: bool = True,
) -> tuple[TorchDecoder, TorchDecoder]:
    """A decoder with the step, and one on the same weights without."""
    of = loaded(folder, family, device, dtype)
    fused, twin = (TorchDecoder(*of, device=device, dtype=dtype, fused=False) for _ in range(2))
    fused.step = GraphStep(fused.shared, graph=graph, run_ahead=run_ahead)
    for each in (fused, twin):
        each.open(lanes, capacity)
    return fused, twin


def step_of(decoder: TorchDecoder) -> GraphStep:
    assert isinstance(decoder.step, GraphStep)
    return decoder.step


def same(a: StepOutput, b: StepOutput, tolerance: float = 3e-5) -> bool:
    """Whether two outputs agree in every array, their shapes and dtypes; drawn tokens aside."""
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if name == "drawn":
            continue
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                return False
            if not np.allclose(x, y, rtol=0, atol=tolerance, equal_nan=True):
                return False
        elif x != y:
            return False
    return True


def vary(decoder: TorchDecoder, lane: int, expression: str) -> None:
    decoder.set_policies(lane, policies_of(expression, decoder.routers, decoder.dtype))


def column(tokens: Any) -> np.ndarray:
    return np.asarray(tokens, np.int64).reshape(-1, 1)


def draws_for(decoder: TorchDecoder, lanes: Sequence[int], asked: Sampling) -> list[Draw]:
    """How the tokens after the next ones will be drawn."""
    at = [decoder.length(lane) + 1 for lane in lanes]
    return [Draw(asked, p, sampling.uniform(asked.seed, p)) for p in at]
