"""Real shapes with random weights, made on the device from a seed: no checkpoint, no disk.

Also what every step begins with: its arguments, its report, and a decoder on those weights.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_results import Report
from torch import Tensor

from moescope.engine import families, parameters
from moescope.engine.decoder import DecoderSpec, state_bytes
from moescope.engine.torch_decoder import TorchDecoder

OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "olmoe": OLMOE,
    "qwen3": QWEN3,
    "olmoe tiny": OLMOE
    | _SMALL
    | {"intermediate_size": 32, "num_key_value_heads": 4, "num_experts": 8}
    | {"num_experts_per_tok": 3},
    "qwen3 tiny": QWEN3
    | _SMALL
    | {"moe_intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16},
}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Shapes and weights that decoders and peers share."""

    config: dict[str, Any]
    spec: DecoderSpec  # dtypes resolved
    weights: dict[str, Tensor]
    device: str
    dtype: str

    @property
    def item(self) -> int:
        return next(iter(self.weights.values())).itemsize

    def decoder(self, lanes: int = 1, capacity: int = 1024, *, fused: bool = True) -> TorchDecoder:
        decoder = TorchDecoder(
            self.spec, self.weights, device=self.device, dtype=self.dtype, fused=fused
        )
        decoder.open(lanes, capacity)
        return decoder

    def token_bytes(self, position: int) -> float:
        """What decoding one token after `position` others must read: active weights and cache."""
        cache = state_bytes(self.spec, max(0, position), self.item)
        return float(parameters.count_active(self.spec) * self.item + cache)

    def union_bytes(self, distinct: float, lanes: int, position: int) -> float:
        """The same for a batch: shared weights once, `distinct` experts in all layers together."""
        experts = [s for s in parameters.slots(self.spec) if s.per_expert]
        routed = sum(s.elements // s.shape[0] for s in experts)  # one expert of every layer
        layers = len(self.spec.routers())
        chosen = sum(spec.K for _, _, spec in self.spec.routers())
        active = parameters.count_active(self.spec)
        shared = active - routed * chosen / layers
        cache = lanes * state_bytes(self.spec, max(0, position), self.item)
        return (shared + routed * distinct / layers) * self.item + cache

    def loaded(self, decoder: TorchDecoder) -> Loaded:
        return Loaded(decoder, {"context": self.spec.context, "name": "random weights"})


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """As much of a loaded model as a session and a trace ask for."""

    interpreter: TorchDecoder
    facts: Mapping[str, Any]


def make(name: str, device: str, *, dtype: str = "bfloat16", layers: int = 0) -> Model:
    """Random weights of the shapes `name`, of its first `layers` layers (0: of all)."""
    config = dict(CONFIGS[name])
    if layers:
        config["num_hidden_layers"] = layers
    return make_of(config, device, dtype)


def make_of(config: dict[str, Any], device: str, dtype: str) -> Model:
    """Random weights for a config."""
    spec = families.build(config, dtype)
    return Model(config, spec, random_weights(spec, device, dtype), device, dtype)


def random_weights(spec: DecoderSpec, device: str, dtype: str, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of `parameters.slots(spec)`: norms near 1, gates and heads that spread over several
    nats, everything else of a size that keeps the residual in range."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for slot in parameters.slots(spec):
        kind = getattr(torch, "float32" if slot.dtype == "float32" else dtype)
        tensor = torch.empty(slot.shape, dtype=kind, device=device)
        if slot.name.endswith("norm.weight"):
            tensor.normal_(1.0, 0.1, generator=generator)
        elif slot.name == "embed.weight":
            tensor.normal_(0.0, 1.0, generator=generator)
        else:
            gain = 2.0 if slot.name.endswith(("gate.weight", "head.weight")) else 1.0
            width = gain / slot.shape[-1] ** 0.5
            for part in tensor if len(slot.shape) == 3 else (tensor,):
                part.normal_(0.0, width, generator=generator)
        weights[slot.name] = tensor
    return weights


# --- what every step begins with ------------------------------------------------------------------


def parser(says: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=says.splitlines()[0])
    found.add_argument("--step", required=True, help="the name of the result")
    found.add_argument("--shape", choices=("olmoe", "qwen3"), default="olmoe")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--limit", type=float, default=540, help="seconds after which it is ended")
    found.add_argument("--tiny", action="store_true")
    return found


def begin(asked: argparse.Namespace) -> tuple[Report, str]:
    """The step's report, and the name of its shapes. From here on SIGTERM ends it in good order."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.device == "cpu":
        with contextlib.suppress(RuntimeError):
            torch.set_num_threads(1)
    shape = f"{asked.shape} tiny" if asked.tiny else asked.shape
    return Report(asked.step, asked.out, asked.device, asked.tiny), shape


def prompt(model: Model, tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.vocab_size, (tokens,), generator=generator).tolist()
