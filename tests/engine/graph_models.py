"""Decoders of every family on random weights, one layer of each kind: with the fused step, and a
twin without. No transformers model is made: configs become specs, and a seed fills every slot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET"):
    import tests.kernels.interpreted  # noqa: F401

from moescope.engine.decoder import DecoderSpec, Layer
from moescope.engine.graph_step import GraphStep
from moescope.engine.interpreter import StepOutput
from moescope.engine.limits import TORCH
from moescope.engine.operators import RopeScaling
from moescope.engine.parameters import Slot, slots
from moescope.engine.torch_decoder import TorchDecoder
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from moescope.kernels.triton_ops import tiles
from moescope.variants import CATALOGUE, applicable, parse
from tests.families import CASES
from tests.families.kit import Case
from tests.oracle.matrix import spec_of

BY_ID = {case.id: case for case in CASES}


def is_covered(case: Case) -> bool:
    """Whether libraries here know its config, and torch operators do it."""
    try:
        return TORCH.first(spec_of(case)) is None
    except (ImportError, KeyError, ValueError, MoescopeError):
        return False


COVERED = [case.id for case in CASES if is_covered(case)]
Pair = tuple[TorchDecoder, TorchDecoder]
IDS = np.random.default_rng(3).integers(0, 250, (2, 40))
# Ends of names -> standard deviation, mean; other vectors are as biases.
_FILLS = ((("norm.weight", "scale", "gain", ".D"), (0.25, 1.0)), (("bias", "sinks"), (0.5, 0.0)))


def large_tiles(monkeypatch: Any) -> None:
    """An interpreted program takes a millisecond whatever it does: few of them."""
    if os.environ.get("TRITON_INTERPRET"):
        monkeypatch.setattr(tiles, "LINEAR_ROWS", ((0, 64),))
        monkeypatch.setattr(tiles, "WIDE_ROWS", ((tiles.WIDEST, 64),))
        monkeypatch.setattr(tiles, "EXPERT_ROWS", ((tiles.WIDEST, 64, 64),))


def of_each_kind(spec: DecoderSpec) -> DecoderSpec:
    """The first layer of every kind, and the layers that those cannot do without: an indexer's
    choice is shared with layers behind it."""
    kept: list[Layer] = []
    for layer in spec.layers:
        if layer not in kept:
            kept.append(layer)
    return replace(spec, layers=tuple(kept))


def weights_of(spec: DecoderSpec, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A tensor for every slot, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for slot in slots(spec):
        noise = torch.randn(slot.shape, generator=generator)
        kind = torch.float32 if slot.dtype == "float32" else dtype
        found[slot.name] = _filled(slot, noise).to(device, kind)
    return found


def _filled(slot: Slot, noise: Tensor) -> Tensor:
    for ends, (deviation, mean) in _FILLS:
        if slot.name.endswith(ends) or (noise.ndim == 1 and not mean):
            return mean + deviation * noise
    gain = 2.0 if slot.name.endswith(("gate.weight", "head.weight")) else 1.2
    return noise if slot.name == "embed.weight" else gain * noise / noise.shape[-1] ** 0.5


@cache
def _made(case: Case, dtype: str, device: str) -> tuple[DecoderSpec, dict[str, Tensor]]:
    spec = of_each_kind(spec_of(case))
    return spec, weights_of(spec, getattr(torch, dtype), device)


def pair_of(
    case: Case, *, dtype: str = "float32", device: str = "cpu", lanes: int = 1, capacity: int = 64
) -> Pair:
    """A decoder with the step, captured where there are graphs, and one on the same weights."""
    of = _made(case, dtype, device)
    fused, twin = (TorchDecoder(*of, device=device, dtype=dtype, fused=False) for _ in range(2))
    assert not (why := GraphStep.why_not(fused.shared)), why
    fused.step = GraphStep(fused.shared, graph=device != "cpu")
    for each in (fused, twin):
        each.open(lanes, capacity)
    return fused, twin


def variants_of(decoder: TorchDecoder) -> list[str]:
    """Those of the catalogue that mean something to every router, and see its logits only."""
    specs = [router.spec for router in decoder.routers]
    return [
        name
        for name in CATALOGUE
        if name != "trained"
        and all(applicable(name, spec) for spec in specs)
        and parse(name).on_logits
    ]


def marks(case: Case) -> set[tuple[str, Any]]:
    """What a case sets in its layers: (`Class.field`, the word it is set to, or True). What a
    policy says is data of one kernel, and lengths and sizes are no branches."""
    return set(_marks(of_each_kind(spec_of(case))))


def _marks(value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if isinstance(value, RouterPolicy | RopeScaling):
        return
    for field in fields(value):
        held = getattr(value, field.name)
        for item in held if isinstance(held, tuple) else (held,):
            if is_dataclass(item):
                yield from _marks(item)
        named = isinstance(held, str) and field.name not in ("name", "reads", "adds_to")
        plain = field.default is MISSING or is_dataclass(held) or held == field.default
        if not plain and (named or isinstance(held, bool | int | float)):
            yield f"{kind.__name__}.{field.name}", held if named else True


TOLERANCE = {"weights": 1e-5, "scores": 1e-5, "shadow_weights": 1e-5, "logits": 1e-4}


def differences(a: StepOutput, b: StepOutput) -> list[str]:
    """Fields in which two outputs are not the same up to rounding; drawn tokens aside."""
    found = []
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if name == "drawn":
            continue
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            near = TOLERANCE.get(name, 3e-5)
            alike = (x.shape, x.dtype) == (y.shape, y.dtype)
            if not alike or not np.allclose(x, y, rtol=1e-5, atol=near, equal_nan=True):
                found.append(name)
        elif x != y:
            found.append(name)
    return found
