"""Decoders on the device for the tests here: tiny ones of every family, and real shapes cut short.

A pair is the decoder with its fused step and a twin on the same weights that has only the torch
operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moescope.engine import families, parameters
from moescope.engine.interpreter import StepOutput
from moescope.engine.lane import policies_of
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from moescope.engine.torch_decoder import TorchDecoder
from tests.tiny import tiny_checkpoint

DEVICE = "cuda"
Pair = tuple[TorchDecoder, TorchDecoder]

_COMMON = {"num_hidden_layers": 2, "hidden_size": 2048, "num_experts_per_tok": 8}
REAL: dict[str, dict[str, Any]] = {
    "olmoe": _COMMON
    | {
        "vocab_size": 50304,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_experts": 64,
        "rope_theta": 10000.0,
    },
    "qwen3_moe": _COMMON
    | {
        "vocab_size": 151936,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
}


def tiny_pair(
    folder: Path, family: str, dtype: str = "float32", lanes: int = 1, capacity: int = 256
) -> Pair:
    path = tiny_checkpoint(family, folder)
    model = load_model(LoadRequest(str(path), device=DEVICE, dtype=dtype)).interpreter
    assert isinstance(model, TorchDecoder)
    return _opened(model, lanes, capacity)


def real_pair(family: str, dtype: str, lanes: int = 1, capacity: int = 256) -> Pair:
    """Random weights in the shapes of a released model, of two layers."""
    spec = families.build({"model_type": family, **REAL[family]}, dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = {}
    for slot in parameters.slots(spec):
        tensor = torch.empty(slot.shape, dtype=getattr(torch, dtype), device=DEVICE)
        if slot.name.endswith("norm.weight"):
            tensor.normal_(1.0, 0.2, generator=generator)
        else:
            gain = 2.0 if slot.name.endswith(("gate.weight", "head.weight")) else 1.2
            width = 1.0 if slot.name == "embed.weight" else gain / slot.shape[-1] ** 0.5
            tensor.normal_(0.0, width, generator=generator)
        weights[slot.name] = tensor
    return _opened(TorchDecoder(spec, weights, device=DEVICE, dtype=dtype), lanes, capacity)


def _opened(decoder: TorchDecoder, lanes: int, capacity: int) -> Pair:
    twin = TorchDecoder(
        decoder.spec,
        decoder.shared.weights,
        device=decoder.device,
        dtype=decoder.dtype,
        fused=False,
    )
    for each in (decoder, twin):
        each.open(lanes, capacity)
    return decoder, twin


def vary(decoder: TorchDecoder, lane: int, expression: str) -> None:
    decoder.set_policies(lane, policies_of(expression, decoder.routers, decoder.dtype))


def same(
    a: StepOutput, b: StepOutput, *, tolerance: float = 2e-4, clear: float = 1e-4
) -> list[str]:
    """Fields in which two outputs differ. Experts are compared as sets, their weights by id, and
    only in rows whose margin is `clear`; what follows a row that is not clear is not known."""
    wrong = []
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if name != "drawn" and (x is None) != (y is None):
            wrong.append(f"{name} is missing")
    known = np.nan_to_num(a.margin, nan=np.inf) > clear  # [N, T, L]
    order_a, order_b = np.argsort(a.expert_ids, -1), np.argsort(b.expert_ids, -1)
    for name in ("expert_ids", "weights", "scores"):
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            continue
        x, y = np.take_along_axis(x, order_a, -1), np.take_along_axis(y, order_b, -1)
        if not np.allclose(x[known], y[known], rtol=tolerance, atol=tolerance):
            wrong.append(name)
    for name in ("score_sum", "mass", "entropy", "margin"):
        x, y = getattr(a, name)[known], getattr(b, name)[known]
        if not np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
            wrong.append(name)
    if not np.allclose(a.logits, b.logits, rtol=20 * tolerance, atol=20 * tolerance):
        wrong.append("logits")
    if a.router_logits is not None and b.router_logits is not None:
        x, y = a.router_logits, b.router_logits
        if not np.allclose(x, y, rtol=20 * tolerance, atol=20 * tolerance, equal_nan=True):
            wrong.append("router_logits")
    return wrong


def feed(decoder: TorchDecoder, lanes: Sequence[int], tokens: Any, **options: Any) -> StepOutput:
    """One token for each of `lanes`."""
    return decoder.run(lanes, np.asarray(tokens).reshape(len(lanes), 1), **options)
