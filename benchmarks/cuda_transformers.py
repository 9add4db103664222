"""transformers on the weights of a decoder, shared in place: no byte is copied.

A model is made without memory, and its parameters become views of ours: query, key and value rows
of one matrix, experts as they are. So the peer reads the same addresses, and its tokens can be
compared with ours. Everything is written for batch 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cuda_clock as clock
import numpy as np
import torch
from cuda_shapes import Model, prompt
from torch import Tensor

CAPACITY, PROMPT = 512, 128
SECONDS = 1.5  # of one measurement
RENAMED = {
    "attention.pre_norm": "input_layernorm",
    "mlp.pre_norm": "post_attention_layernorm",
    "attention.": "self_attn.",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
}
TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "final_norm.weight": "model.norm.weight",
}


@dataclass(frozen=True, slots=True)
class Mode:
    """`experts` is an experts_implementation; `runs` is how a token is decoded."""

    experts: str
    runs: str  # dynamic cache, static cache, its own CUDA graph, compiled
    limit: int = 90  # seconds, the making of the model left out

    @property
    def name(self) -> str:
        return f"{self.experts}, {self.runs}"


# Likely ones first; those that may hang or leave the device in a bad way last.
MODES = (
    Mode("grouped_mm", "dynamic"),
    Mode("batched_mm", "dynamic"),
    Mode("eager", "dynamic"),
    Mode("grouped_mm", "static"),
    Mode("batched_mm", "graph"),
    Mode("grouped_mm", "graph"),
    Mode("deepgemm", "dynamic", 45),
    Mode("sonicmoe", "dynamic", 45),
    Mode("batched_mm", "compiled", 180),
    Mode("grouped_mm", "compiled", 180),
    Mode("eager", "compiled", 120),
)


def measure(model: Model, mode: Mode) -> dict[str, Any]:
    """Tokens per second, and seconds to the first token of a prompt, of one mode."""
    peer = build(model, mode.experts)
    ids = torch.tensor([prompt(model, PROMPT)], device=model.device)
    first = clock.median_time(
        lambda: int(peer(input_ids=ids, use_cache=False, logits_to_keep=1).logits.argmax()),
        model.device,
        repeats=3,
        warm=1,
    )
    began = time.perf_counter()
    step = STEPS[mode.runs](peer, ids)
    step()
    clock.synchronize(model.device)
    warm = time.perf_counter() - began
    return {
        "tokens_per_second": 1 / per_token(step, model.device),
        "first_token_seconds": first,
        "warm_up_seconds": warm,
    }


def per_token(step: Callable[[], Any], device: str, most: int = 240) -> float:
    """Seconds of a token, over about `SECONDS`; nothing waits for the device in between."""

    def block(count: int) -> float:
        return clock.timed(lambda: [step() for _ in range(count)], device) / count

    for _ in range(3):
        step()
    guess = block(4)
    return block(int(min(max(8, SECONDS / guess), most)))


# --- the model on our weights ---------------------------------------------------------------------


def build(model: Model, experts: str) -> Any:
    """A transformers model of the same config whose parameters are views of our weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = {k: v for k, v in model.config.items() if k not in ("model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": model.config["rope_theta"]}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(
        model.config["model_type"], **wanted, **ends, rope_parameters=rope
    )
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, model.dtype),
            attn_implementation="sdpa",
            experts_implementation=experts,
        )
    peer.load_state_dict(state(model), assign=True, strict=True)
    with torch.device(model.device):  # its tables are computed, not loaded
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config=config)
    for name, tensor in (*peer.named_parameters(), *peer.named_buffers()):
        assert tensor.device.type == model.device, f"{name} is on {tensor.device}"
    return peer.requires_grad_(False).eval()


def state(model: Model) -> dict[str, Tensor]:
    """Our tensors by transformers' names."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.weights.items():
        if name in TOP:
            found[TOP[name]] = tensor
            continue
        _, number, rest = name.split(".", 2)
        if rest == "attention.qkv.weight":
            attention = model.spec.layers[int(number)].branches[0].operator
            width = attention.kv_heads * attention.head_dim
            rows = (attention.heads * attention.head_dim, width, width)
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                found[f"model.layers.{number}.self_attn.{letter}_proj.weight"] = part
            continue
        for ours, theirs in RENAMED.items():
            rest = rest.replace(ours, theirs)
        found[f"model.layers.{number}.{rest}"] = tensor
    return found


# --- ways to decode -------------------------------------------------------------------------------


def dynamic(peer: Any, ids: Tensor) -> Callable[[], Tensor]:
    from transformers import DynamicCache

    return _loop(peer, peer, ids, DynamicCache(config=peer.config))


def static(peer: Any, ids: Tensor) -> Callable[[], Tensor]:
    return _loop(peer, peer, ids, _static_cache(peer))


def compiled(peer: Any, ids: Tensor) -> Callable[[], Tensor]:
    """torch.compile with its CUDA graphs, over a static cache."""
    run = torch.compile(peer.forward, mode="reduce-overhead", fullgraph=False, dynamic=False)
    step = _loop(peer, run, ids, _static_cache(peer))
    for _ in range(3):  # compiles, records, replays
        step()
    return step


def graph(peer: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A CUDA graph of the whole step over a static cache, which counts positions on the device."""
    if ids.device.type != "cuda":
        raise RuntimeError("a CPU has no graphs")
    cache = _static_cache(peer)
    last = _filled(peer, ids, cache)

    def work() -> None:
        out = peer(input_ids=last, past_key_values=cache, use_cache=True)
        last.copy_(out.logits[:, -1:].argmax(-1))

    return clock.captured(work).replay


def _static_cache(peer: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=peer.config, max_cache_len=CAPACITY)


def _filled(peer: Any, ids: Tensor, cache: Any) -> Tensor:
    """The token after the prompt, which is in the cache then."""
    out = peer(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last: Tensor = out.logits[:, -1:].argmax(-1).clone()
    return last


def _loop(peer: Any, run: Callable[..., Any], ids: Tensor, cache: Any) -> Callable[[], Tensor]:
    last = _filled(peer, ids, cache)

    def step() -> Tensor:
        if ids.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        out = run(input_ids=last, past_key_values=cache, use_cache=True)
        last.copy_(out.logits[:, -1:].argmax(-1))
        return last

    return step


STEPS = {"dynamic": dynamic, "static": static, "compiled": compiled, "graph": graph}


# --- against ours ---------------------------------------------------------------------------------


def parity(model: Model, experts: str) -> dict[str, float]:
    """The same prompt through our prefill and transformers': how much of it is the same."""
    ids = np.array([prompt(model, 48, seed=9)])
    decoder = model.decoder(capacity=64)
    ours = torch.from_numpy(decoder.run([0], ids, all_logits=True).logits[0])
    theirs = build(model, experts)(input_ids=torch.from_numpy(ids).to(model.device))
    logits = theirs.logits[0].float().cpu()
    return {
        "tokens": float((ours.argmax(-1) == logits.argmax(-1)).float().mean()),
        "logits_relative_error": float((ours - logits).norm() / logits.norm()),
    }
