"""Tiny decoders of every family with random weights, twice: on the torch operators, and with the C
step beside them. Weights are made from the spec, so no checkpoint is written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moescope.engine import families, parameters
from moescope.engine.decoder import DecoderSpec
from moescope.engine.interpreter import StepOutput
from moescope.engine.native_step import NativeStep
from moescope.engine.torch_decoder import TorchDecoder
from tests.families.kit import Case
from tests.oracle.matrix import spec_of


def random_weights(spec: DecoderSpec, dtype: str, seed: int = 0) -> dict[str, Tensor]:
    """Norms around one, biases of both signs, routers spread over several nats."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for slot in parameters.slots(spec):
        noise = torch.randn(slot.shape, generator=generator)
        last = slot.name.rpartition(".")[0]
        kept = torch.float32 if slot.dtype == "float32" else getattr(torch, dtype)
        if len(slot.shape) == 1 and ("norm" in last or slot.name.endswith("scale")):
            values = 1.0 + 0.25 * noise
        elif len(slot.shape) == 1 or slot.name.endswith("_bias"):
            values = 0.5 * noise
        elif slot.name == "embed.weight":
            values = noise
        else:
            gain = 2.0 if slot.name.endswith(("gate.weight", "head.weight")) else 1.0
            values = gain * noise / slot.shape[-1] ** 0.5
        made[slot.name] = values.to(kept)
    return made


@cache
def weights_of(spec: DecoderSpec, dtype: str, seed: int = 0) -> dict[str, Tensor]:
    return random_weights(spec, dtype, seed)


def spec_in(case: Case, dtype: str) -> DecoderSpec:
    return families.resolved(spec_of(case), dtype)


def pair(
    spec: DecoderSpec,
    dtype: str = "float32",
    *,
    lanes: int = 1,
    capacity: int = 64,
    threads: int = 2,
    seed: int = 0,
) -> list[TorchDecoder]:
    """The torch operators alone, and the C step on the same weights."""
    made = []
    for fused in (False, True):
        weights = weights_of(spec, dtype, seed)
        model = TorchDecoder(spec, weights, device="cpu", dtype=dtype, fused=False)
        if fused:
            assert NativeStep.why_not(model.shared) == ""
            model.step = NativeStep(model.shared, threads=threads)
        model.open(lanes, capacity)
        made.append(model)
    return made


def agree(a: StepOutput, b: StepOutput, tolerance: float = 2e-5) -> None:
    """Two outputs say the same, in every array; what only the C step gives is left out."""
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if name in ("expected", "kept"):
            continue
        if not isinstance(x, np.ndarray):
            assert x == y, name
            continue
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        exact = 0 if x.dtype == np.int16 else tolerance
        size = 1.0 if x.dtype == np.int16 or not x.size else max(1.0, float(np.nanmax(np.abs(x))))
        assert np.allclose(x, y, rtol=0, atol=exact * size, equal_nan=True), (
            name,
            np.nanmax(np.abs(x.astype(float) - y)),
        )


def walk(
    models: Sequence[TorchDecoder], lanes: list[int], steps: int, record: Any = "logits"
) -> None:
    """Decode greedily with the first model; all of them say the same of every token."""
    token = 7 + np.arange(len(lanes))[:, None]
    for _ in range(steps):
        wanted, *others = (model.run(lanes, token, record=record) for model in models)
        for found in others:
            agree(wanted, found)
        token = wanted.logits[:, 0].argmax(-1)[:, None] % 250
