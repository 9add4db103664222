"""A checkpoint in words and numbers, from its config and headers alone: what `inspect` prints."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from moescope.engine import families, parameters
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.decoder import MLA, MLP, Attention, DecoderSpec, Layer, MoE, state_bytes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_CONTEXT = 4096  # tokens of cache counted in the memory needed


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that can be said without reading a weight; JSON values only.

    Raises MoescopeError for configs that are not supported, or that do not fit the tensors.
    """
    family = families.family_of(checkpoint.config)
    spec = families.build(checkpoint.config)
    stored = checkpoint.tensors
    plan = families.plan(checkpoint.config, spec, stored) if stored else None
    active = parameters.count_active(spec)
    context = min(spec.context, MEMORY_CONTEXT)
    routers = [router for _, _, router in spec.routers()]
    return {
        "name": checkpoint.name,
        "model_type": str(checkpoint.config["model_type"]),
        "family": family.title,
        "router": routers[0].line(),
        "router_fields": [
            {"first_layer": first, "last_layer": last, "spec": router.to_json()}
            for first, last, router in _router_runs(spec)
        ],
        "num_layers": len(spec.layers),
        "num_routers": len(routers),
        "num_experts": routers[0].wiring.num_experts,
        "num_experts_per_tok": routers[0].policy.num_experts_per_tok,
        "hidden_size": spec.hidden,
        "vocab_size": spec.vocab_size,
        "context": spec.context,
        "parameters": parameters.count(spec),
        "active_parameters": active,
        "bytes_per_token": {name: size * active for name, size in BYTES.items()},
        "memory_needed": {
            name: size * parameters.count(spec) + state_bytes(spec, context, size)
            for name, size in BYTES.items()
        },
        "weights_bytes": checkpoint.weights_bytes if stored else None,
        "stored_as": sorted({tensor.dtype for tensor in stored.values()}),
        "shards": len(checkpoint.shards),
        "layout": ", ".join(plan.layouts) if plan is not None else None,
        "tokenizer": (checkpoint.folder / "tokenizer.json").is_file(),
        "layers": [[first, last, line] for first, last, line in _layer_runs(spec)],
        "notes": [*checkpoint.notes, *(plan.notes() if plan is not None else [])],
    }


def _layer_runs(spec: DecoderSpec) -> list[tuple[int, int, str]]:
    """(first, last, words), runs of layers that read alike folded."""
    runs = []
    for line, group in groupby(enumerate(map(layer_line, spec.layers)), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        runs.append((numbers[0], numbers[-1], line))
    return runs


def _router_runs(spec: DecoderSpec) -> list[tuple[int, int, Any]]:
    """(first, last, spec) of routers, equal ones folded, layers without one in between too."""
    runs = []
    for router, group in groupby(spec.routers(), key=lambda item: item[2]):
        numbers = [layer for layer, _, _ in group]
        runs.append((numbers[0], numbers[-1], router))
    return runs


def layer_line(layer: Layer) -> str:
    """One layer in words: its mixer, then its feed-forward part."""
    return "; ".join(_operator_line(branch.operator) for branch in layer.branches)


def _operator_line(operator: Any) -> str:
    match operator:
        case Attention():
            return _attention_line(operator)
        case MLA():
            return f"latent attention, {operator.heads} heads, latent {operator.kv_lora_rank}"
        case MLP():
            return f"dense, width {operator.width}"
        case MoE():
            return _moe_line(operator)
        case _:
            return type(operator).__name__


def _attention_line(a: Attention) -> str:
    parts = [f"attention, {a.heads} heads on {a.kv_heads} of {a.head_dim}"]
    if a.window:
        parts.append(f"window {a.window}")
    if a.qk_norm is not None:
        parts.append("q/k norm " + ("per head" if a.qk_norm_over == "per_head" else "flat"))
    if a.qkv_bias:
        parts.append("q/k/v bias")
    if a.clip_qkv is not None:
        parts.append(f"clip {a.clip_qkv:g}")
    return ", ".join(parts)


def _moe_line(m: MoE) -> str:
    line = f"{m.router.wiring.num_experts} experts of width {m.experts.width}, {m.router.line()}"
    if m.shared is not None:
        gate = "gated" if m.router.wiring.shared_expert_gate != "none" else "added"
        line += f"; shared expert of width {m.shared.width}, {gate}"
    return line
