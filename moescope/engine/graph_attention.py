"""Softmax attention of a fused step: which products run around `triton_ops.attention`, and what a
spec is to that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moescope.engine.graph_parts import After, Before, Running, Weights, rms_weight
from moescope.engine.operators import Attention, Norm
from moescope.engine.torch_operators import switches
from moescope.engine.torch_operators.attention import WARMTH, TorchAttention
from moescope.kernels.triton_ops import attention, gemv


class FusedAttention:
    """Three launches: q, k and v; attention with everything around it; the output. One more for a
    gate that has a product of its own."""

    def __init__(
        self, spec: Attention, weights: Weights, path: str, dtype: torch.dtype, run: TorchAttention
    ) -> None:
        self.spec, self.shape, self.run = spec, attention_shape(spec), run
        self.qkv, self.qkv_bias = weights[f"{path}.qkv.weight"], weights.get(f"{path}.qkv.bias")
        self.out = weights[f"{path}.o_proj.weight"]
        self.out_bias = weights.get(f"{path}.o_proj.bias")
        self.sinks = weights.get(f"{path}.sinks")
        self.gate = weights.get(f"{path}.gate_proj.weight")
        self.gate_bias = weights.get(f"{path}.gate_bias")
        self.norms = qk_weights(spec, weights, path, dtype)
        self._warmth = torch.empty(0)

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        inputs, rope = step.buffers.inputs.device, self.spec.rope
        h, riding = before.opened(read)
        qkv = gemv.linear_small(h, self.qkv, self.qkv_bias, **riding, pdl=step.pdl)
        mixed = attention.attend(
            qkv,
            self.run.keys,
            self.run.values,
            inputs["lanes"],
            inputs["positions"],
            self.shape,
            step.scratch.attention,
            weights=self.norms,
            rotation=None if rope is None else step.buffers.shared.tables[id(rope)],
            warmth=self.warmth(self.run.keys),
            sinks=self.sinks,
            gate=self._gate(h, riding, step),
            out=qkv.new_empty(len(qkv), self.shape.heads * self.shape.values),
            pdl=step.pdl,
        )
        y = gemv.linear_small(mixed, self.out, self.out_bias, **after.riding(held), pdl=step.pdl)
        return after.rest(y, held)

    def warmth(self, keys: Tensor) -> Tensor | None:
        """What the queries of every position are multiplied by [capacity]."""
        spec, capacity = self.spec, keys.shape[2]
        if not spec.temperature_scale:
            return None
        if len(self._warmth) != capacity:
            positions = torch.arange(capacity, device=keys.device).float()
            self._warmth = WARMTH[spec.temperature_kind](positions + 1, spec)
        return self._warmth

    def _gate(self, h: Tensor, riding: dict[str, Any], step: Running) -> Tensor | None:
        if self.gate is None:
            return None
        gate: Tensor = gemv.linear_small(h, self.gate, **riding, pdl=step.pdl)
        if self.gate_bias is not None:
            gate += self.gate_bias.repeat_interleave(len(self.gate) // self.spec.heads)
        return gate


def attention_shape(spec: Attention) -> attention.Shape:
    norm, rope = spec.qk_norm, spec.rope
    per_head = "per_head_after" if spec.qk_norm_after_rope else "per_head"
    form, _, of = spec.gate.partition("_")
    return attention.Shape(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        value_dim=spec.v_head_dim,
        window=spec.window,
        chunk=spec.chunk,
        clip=spec.clip_qkv,
        softcap=spec.softcap,
        norm="none" if norm is None else "flat" if spec.qk_norm_over == "flat" else per_head,
        norm_wide=norm is not None and norm.applies == "float32",
        q_eps=norm.eps if norm else 0.0,
        k_eps=(spec.kv_norm or norm).eps if norm else 0.0,
        value_norm=spec.v_norm is not None,
        v_eps=spec.v_norm.eps if spec.v_norm else 0.0,
        value_scale=spec.value_scale,
        keys_are_values=spec.keys_are_values,
        rope=rope.style if rope else "none",
        dims=rope.dims if rope else 0,
        long_from=rope.scaling.original_context if rope and rope.scaling and switches(rope) else 0,
        gate="sigmoid" if form == "in" else form,
        gate_of="heads" if of == "per_head" else "columns",
        gate_in_row=spec.gate == "in_q_proj",
    )


def qk_weights(
    spec: Attention, weights: Weights, path: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Of the norms of queries and keys."""
    if spec.qk_norm is None:
        return None
    q = rms_weight(spec.qk_norm, weights, f"{path}.q_norm", dtype)
    k = rms_weight(spec.kv_norm or spec.qk_norm, weights, f"{path}.k_norm", dtype)
    assert q is not None and k is not None, "refused by `why_not_attention`"
    return q.weight, k.weight


def why_not_attention(spec: Attention) -> str:
    """What of an attention the kernel does not do, or ""."""

    def plain(norm: Norm | None) -> bool:
        return norm is None or not (norm.kind == "layer" or norm.bias or norm.gate_rank)

    flat = spec.qk_norm_over == "flat" and spec.qk_norm is not None
    if not all(map(plain, (spec.qk_norm, spec.kv_norm, spec.v_norm))):
        return "a norm of queries, keys or values other than RMS: no fused form"
    if spec.v_norm is not None and spec.v_norm.weight:
        return "a norm of values with a weight: no fused form"
    if flat and (spec.qk_norm_after_rope or spec.gate == "in_q_proj"):
        return "a flat norm of turned or gated queries: no fused form"
    return ""
