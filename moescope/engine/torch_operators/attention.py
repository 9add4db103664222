"""Softmax attention with grouped keys and values over a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import Attention
from moescope.engine.torch_operators.common import Call, Weights, linear
from moescope.engine.torch_operators.norms import make_norm
from moescope.engine.torch_operators.rope import rotate

QUERY_BLOCK = 512


class CachedAttention:
    """Softmax attention of placed queries over what a lane has cached.

    Caches are keys [lanes, kv heads, capacity, D] and values [.., Dv], allocated by `open`; where
    both are of one width they are the halves of `cache`, which fused steps read. Windows, chunks,
    scale and softcap are those of `spec`; heads are as many as there are queries.
    """

    def __init__(self, spec: Attention, dtype: torch.dtype, sinks: Tensor | None = None) -> None:
        self.spec, self.dtype, self.sinks = spec, dtype, sinks
        self.v_dim = spec.v_head_dim or spec.head_dim
        self.cache = torch.empty(0)
        self.keys = self.values = torch.empty(0)

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Allocate the caches, keeping what they hold."""
        old, s = (self.keys, self.values), self.spec
        shape = (lanes, s.kv_heads, capacity)
        if self.v_dim == s.head_dim:
            self.cache = torch.zeros((2, *shape, s.head_dim), dtype=self.dtype, device=device)
            self.keys, self.values = self.cache[0], self.cache[1]
        else:
            self.keys = torch.zeros((*shape, s.head_dim), dtype=self.dtype, device=device)
            self.values = torch.zeros((*shape, self.v_dim), dtype=self.dtype, device=device)
        for held, new in zip(old, (self.keys, self.values), strict=True):
            if held.numel():
                new[: held.shape[0], :, : held.shape[2]] = held

    def copy(self, source: int, target: int, length: int) -> None:
        for cache in (self.keys, self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def attend(self, qk: Tensor, v: Tensor, call: Call) -> Tensor:
        """qk [R, heads + kv heads, D] and v [R, kv heads, Dv] of a call's rows, which are cached ->
        [R, heads × Dv]."""
        run = self._one if call.tokens == 1 else self._many
        parts = [run(lane, start, qk[rows], v[rows]) for lane, start, rows in call.spans()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _first_seen(self, position: int) -> int:
        """The first position that a query sees."""
        s = self.spec
        if s.window:
            return max(0, position - s.window + 1)
        return position // s.chunk * s.chunk if s.chunk else 0

    def _one(self, lane: int, start: int, qk: Tensor, v: Tensor) -> Tensor:
        """One token of one lane: the G query heads of a key head stand as rows, so nothing is
        repeated and, all keys being in sight, nothing is masked."""
        s, end, first = self.spec, start + 1, self._first_seen(start)
        heads = qk.shape[1] - s.kv_heads
        self.keys[lane, :, start], self.values[lane, :, start] = qk[0, heads:], v[0]
        q = qk[0, :heads].view(1, s.kv_heads, -1, s.head_dim)
        keys, values = (cache[None, lane, :, first:end] for cache in (self.keys, self.values))
        if self._is_plain:
            out = F.scaled_dot_product_attention(q, keys, values, scale=s.scale)
        else:
            sinks = None if self.sinks is None else self.sinks.view(1, s.kv_heads, -1, 1)
            out = attend(q, keys, values, None, s.scale, s.softcap, sinks, s.float32_scores)
        return out.reshape(1, -1)

    def _many(self, lane: int, start: int, qk: Tensor, v: Tensor) -> Tensor:
        """T tokens of one lane, after `start` cached ones."""
        s, tokens = self.spec, len(v)
        end, first = start + tokens, self._first_seen(start)
        heads = qk.shape[1] - s.kv_heads
        self.keys[lane, :, start:end] = qk[:, heads:].transpose(0, 1)
        self.values[lane, :, start:end] = v.transpose(0, 1)
        G = heads // s.kv_heads
        keys, values = (
            cache[lane, :, first:end].repeat_interleave(G, 0) for cache in (self.keys, self.values)
        )  # each [heads, S, D]
        q = qk[:, :heads].transpose(0, 1)
        if start == 0 and self._is_plain and self._first_seen(tokens - 1) == 0:
            out = F.scaled_dot_product_attention(
                q[None], keys[None], values[None], is_causal=True, scale=s.scale
            )[0]
        else:
            out = self._masked(q, keys, values, start, first)
        return out.transpose(0, 1).reshape(tokens, -1)

    def _masked(self, q: Tensor, keys: Tensor, values: Tensor, start: int, first: int) -> Tensor:
        """Queries from position `start`, keys from `first`: in blocks, so that masks stay small."""
        s, blocks = self.spec, []
        for at in range(0, q.shape[1], QUERY_BLOCK):
            block = q[:, at : at + QUERY_BLOCK]
            begin = start + at
            end = begin + block.shape[1]
            low = self._first_seen(begin)
            query = torch.arange(begin, end, device=q.device)[:, None]
            key = torch.arange(low, end, device=q.device)[None]
            mask = key <= query
            if s.window:
                mask &= key > query - s.window
            if s.chunk:
                mask &= key >= query // s.chunk * s.chunk
            seen = slice(low - first, end - first)
            arrays = block[None], keys[None, :, seen], values[None, :, seen]
            if self._is_plain:
                out = F.scaled_dot_product_attention(*arrays, mask, scale=s.scale)
            else:
                sinks = None if self.sinks is None else self.sinks.view(1, -1, 1, 1)
                out = attend(*arrays, mask, s.scale, s.softcap, sinks, s.float32_scores)
            blocks.append(out[0])
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    @property
    def _is_plain(self) -> bool:
        return self.sinks is None and not self.spec.softcap


# What queries are multiplied by, for positions counted from 1 (Llama 4; Beam).
WARMTH: dict[str, Callable[[Tensor, Attention], Tensor]] = {
    "log": lambda at, s: (
        torch.log1p(torch.floor(at / s.temperature_floor)) * s.temperature_scale + 1
    ),
    "power": lambda at, s: torch.exp(s.temperature_scale * torch.log1p(at / s.temperature_floor)),
}


class TorchAttention(CachedAttention):
    """Projections, norms, rope and gates around it."""

    def __init__(self, spec: Attention, weights: Weights, path: str, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype, weights.get(f"{path}.sinks"))
        self.qkv, self.qkv_bias = weights[f"{path}.qkv.weight"], weights.get(f"{path}.qkv.bias")
        self.out, self.out_bias = (
            weights[f"{path}.o_proj.weight"],
            weights.get(f"{path}.o_proj.bias"),
        )
        self.normalise = _qk_norms(spec, weights, path)
        self.v_norm = None if spec.v_norm is None else make_norm(spec.v_norm)
        self.gate = weights.get(f"{path}.gate_proj.weight")
        self.gate_bias = weights.get(f"{path}.gate_bias")

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        s = self.spec
        qk, v, gate = self._project(h)
        qk = self._place(qk, call)
        mixed = self.attend(qk, v, call)
        if s.gate != "none":
            mixed = self._gated(mixed, h, gate)
        return linear(mixed, self.out, self.out_bias)

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """qk [R, heads + kv heads, D], v [R, kv heads, Dv], and what gates the output."""
        s, R = self.spec, len(h)
        qkv = linear(h, self.qkv, self.qkv_bias)
        gate = None
        if s.gate == "in_q_proj":
            wide = s.heads * s.head_dim
            q, gate = qkv[:, : 2 * wide].view(R, s.heads, -1).chunk(2, -1)
            gate = gate.reshape(R, wide)
            qkv = torch.cat((q.reshape(R, wide), qkv[:, 2 * wide :]), -1)
        split = (s.heads + s.kv_heads) * s.head_dim
        qk = qkv[:, :split]
        v = qk[:, s.heads * s.head_dim :] if s.keys_are_values else qkv[:, split:]
        if s.clip_qkv is not None:
            v = v.clamp(-s.clip_qkv, s.clip_qkv)
        v = v.reshape(R, s.kv_heads, self.v_dim)
        if self.v_norm is not None:
            v = self.v_norm(v)
        if s.value_scale != 1.0:
            v = v * s.value_scale
        return qk, v, gate

    def _place(self, qk: Tensor, call: Call) -> Tensor:
        """Queries and keys, normalised and turned to their positions."""
        s = self.spec
        if not s.qk_norm_after_rope:
            qk = self.normalise(qk)
        if s.clip_qkv is not None:
            qk = qk.clamp(-s.clip_qkv, s.clip_qkv)
        qk = qk.reshape(len(qk), s.heads + s.kv_heads, s.head_dim)
        if s.rope is not None:
            qk = rotate(qk, s.rope, call.rotations[id(s.rope)])
        if s.qk_norm_after_rope:
            qk = self.normalise(qk.flatten(1)).view_as(qk)
        if s.temperature_scale:
            warmth = WARMTH[s.temperature_kind](call.positions.float() + 1, s)
            queries = (qk[:, : s.heads] * warmth[:, None, None]).to(qk.dtype)
            qk = torch.cat((queries, qk[:, s.heads :]), 1)
        return qk

    def _gated(self, mixed: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            assert self.gate is not None
            gate = linear(h, self.gate)
            if self.gate_bias is not None:
                gate = (gate.view(len(h), self.spec.heads, -1) + self.gate_bias[:, None]).flatten(1)
        if self.spec.gate.startswith("softplus"):
            gate = F.softplus(gate.float()).to(mixed.dtype)
        else:
            gate = torch.sigmoid(gate)
        if gate.shape[-1] == mixed.shape[-1]:
            return mixed * gate
        heads = mixed.view(len(mixed), self.spec.heads, -1)
        return (heads * gate[..., None]).flatten(-2)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    wide: bool = False,
) -> Tensor:
    """Attention of q [.., T, D] over keys [.., S, D] in plain products, with what SDPA has not: a
    softcap on the scores, and sinks (broadcast to [.., T, 1]), logits that take part in the softmax
    and then in nothing (gpt-oss)."""
    dtype = torch.float32 if wide else q.dtype
    scores = q.to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), -1)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return shares[..., : keys.shape[-2]] @ values


def _qk_norms(s: Attention, weights: Weights, path: str) -> Callable[[Tensor], Tensor]:
    """Normalises q and k, side by side in the columns of qk [R, (heads + kv heads) × D]."""
    if s.qk_norm is None:
        return lambda qk: qk
    k_spec = s.kv_norm or s.qk_norm
    q_weight = weights[f"{path}.q_norm.weight"] if s.qk_norm.weight else None
    k_weight = weights[f"{path}.k_norm.weight"] if k_spec.weight else None
    q_bias, k_bias = (weights.get(f"{path}.{name}.bias") for name in ("q_norm", "k_norm"))
    q_norm, k_norm = make_norm(s.qk_norm, q_weight, q_bias), make_norm(k_spec, k_weight, k_bias)
    split = s.heads * s.head_dim
    if s.qk_norm_over == "flat":
        return lambda qk: torch.cat((q_norm(qk[:, :split]), k_norm(qk[:, split:])), -1)
    rounds_first = s.qk_norm.kind == "rms" and s.qk_norm.applies == "model"
    if rounds_first and q_weight is not None and k_weight is not None:
        every = torch.cat((q_weight.expand(s.heads, -1), k_weight.expand(s.kv_heads, -1)))
        shape, eps = (s.head_dim,), s.qk_norm.eps
        return lambda qk: (
            every * F.rms_norm(qk.reshape(len(qk), -1, s.head_dim), shape, None, eps)
        ).flatten(1)

    def per_head(qk: Tensor) -> Tensor:
        heads = qk.reshape(len(qk), -1, s.head_dim)
        return torch.cat((q_norm(heads[:, : s.heads]), k_norm(heads[:, s.heads :])), 1).flatten(1)

    return per_head
