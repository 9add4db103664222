"""Linear attention by the gated delta rule, with one decay a head or one a channel (KDA).

A head keeps a matrix S [Dk, Dv]. With decay a = exp(g), write strength b, key k and value v, a
token makes S <- a S + k (b (v - kᵀ a S))ᵀ and reads qᵀ S (arXiv 2412.06464, equation 10; arXiv
2510.26692 for a decay of every channel). Prompts go in chunks: within one, the corrections of all
tokens are the solution of a unit triangular system.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import LinearAttention
from moescope.engine.torch_operators.common import Call, Weights, linear, split
from moescope.engine.torch_operators.recurrent import Recurrent

CHUNK = 64
FEW = 8  # tokens that are cheaper one by one
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # qkv, log decays, write strengths, gate
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Delta(Recurrent):
    """What both kinds share: convolved q, k, v, the scan, and a gated norm before the output."""

    def __init__(
        self, spec: LinearAttention, weights: Weights, path: str, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.keys = spec.key_heads * spec.key_dim
        self.values = spec.value_heads * spec.value_dim
        channels = 2 * self.keys + self.values
        super().__init__(
            channels, spec.conv_kernel, (spec.value_heads, spec.key_dim, spec.value_dim), dtype
        )
        self.conv = weights[f"{path}.conv.weight"]
        self.decay_rate = weights[f"{path}.A_log"].float().exp().flatten()  # [value heads]
        self.dt_bias = weights[f"{path}.dt_bias"].float().flatten()
        self.norm = weights[f"{path}.norm.weight"]
        self.out = weights[f"{path}.out_proj.weight"]

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        qkv, g, strength, gate = self.inputs(h)
        return self.finish(self.mix(qkv, g, strength, call), gate)

    def inputs(self, h: Tensor) -> Inputs:
        """What `mix` takes of h [R, H], and the gate before the output."""
        raise NotImplementedError

    def mix(self, qkv: Tensor, g: Tensor, strength: Tensor, call: Call) -> Tensor:
        """qkv [R, channels], g [R, value heads] or [.., Dk], strength [R, value heads] -> [R, value
        heads, Dv]."""
        parts = []
        for lane, _, rows in call.spans():
            convolved = self.convolve(lane, qkv[rows], self.conv, None, F.silu)
            q, k, v = self.heads(convolved)
            out, self.matrix[lane] = delta_rule(
                q, k, v, g[rows].float(), strength[rows].float(), self.matrix[lane]
            )
            parts.append(out.to(qkv.dtype))
        return torch.cat(parts)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [T, value heads, D]: a query head serves consecutive value heads."""
        s, T = self.spec, len(qkv)
        q, k, v = split(qkv.float(), self.keys, self.keys, self.values)
        group = s.value_heads // s.key_heads
        q, k = (
            _unit(x.reshape(T, s.key_heads, s.key_dim)).repeat_interleave(group, 1) for x in (q, k)
        )
        return q * s.key_dim**-0.5, k, v.reshape(T, s.value_heads, s.value_dim)

    def finish(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """The norm of every head, the gate, and the output's projection."""
        norm, wide = self.spec.out_norm, mixed.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        if norm.applies == "model":
            wide = self.norm * wide.to(mixed.dtype)
        else:
            wide = self.norm.float() * wide
        wide = wide * GATES[self.spec.out_gate](gate.reshape(mixed.shape).float())
        return linear(wide.to(mixed.dtype).flatten(1), self.out)


class GatedDelta(Delta):
    """One decay a head (Qwen3-Next)."""

    def __init__(
        self, spec: LinearAttention, weights: Weights, path: str, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, weights, path, dtype)
        self.qkvz = weights[f"{path}.in_proj_qkvz.weight"]  # rows of q, k, v, then the gate z
        self.ba = weights[f"{path}.in_proj_ba.weight"]  # write strengths, then decays

    def inputs(self, h: Tensor) -> Inputs:
        qkvz, ba = linear(h, self.qkvz), linear(h, self.ba)
        strength, a = ba.chunk(2, -1)
        g = -self.decay_rate * F.softplus(a.float() + self.dt_bias)
        split = 2 * self.keys + self.values
        return qkvz[:, :split], g, torch.sigmoid(strength), qkvz[:, split:]


class KimiDelta(Delta):
    """One decay a channel, and a gate through a narrow layer (Kimi Linear)."""

    def __init__(
        self, spec: LinearAttention, weights: Weights, path: str, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, weights, path, dtype)
        names = ("qkv", "forget_a", "forget_b", "strength", "gate_a", "gate_b")
        self.qkv, self.forget_a, self.forget_b, self.strength, self.gate_a, self.gate_b = (
            weights.get(f"{path}.{name}.weight") for name in names
        )

    def inputs(self, h: Tensor) -> Inputs:
        s = self.spec
        assert self.qkv is not None and self.strength is not None
        forget = _through(h, self.forget_a, self.forget_b).float() + self.dt_bias
        shape = (len(h), s.value_heads, s.key_dim)
        rate = self.decay_rate.view(1, -1, 1)
        if s.decay_floor:
            g = s.decay_floor * torch.sigmoid(rate * forget.view(shape))
        else:
            g = -rate * F.softplus(forget.view(shape))
        strength = torch.sigmoid(linear(h, self.strength))
        return linear(h, self.qkv), g, strength, _through(h, self.gate_a, self.gate_b)


def _through(h: Tensor, narrow: Tensor | None, wide: Tensor | None) -> Tensor:
    """Two products, by way of a narrow layer where there is one."""
    assert wide is not None
    return linear(h if narrow is None else linear(h, narrow), wide)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """T tokens after `state` [heads, Dk, Dv]: their outputs [T, heads, Dv], and the state then.

    q and k [T, heads, Dk], v [T, heads, Dv], strength [T, heads] and the log decay g [T, heads] or
    [T, heads, Dk], all float32.
    """
    if g.ndim == 3 or len(q) <= FEW:
        return _one_by_one(q, k, v, g, strength, state)
    parts = []
    for at in range(0, len(q), CHUNK):
        rows = slice(at, at + CHUNK)
        out, state = _chunk(q[rows], k[rows], v[rows], g[rows], strength[rows], state)
        parts.append(out)
    return torch.cat(parts), state


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    decays = g.exp()[..., None] if g.ndim == 3 else g.exp()[..., None, None]
    out = torch.empty_like(v)
    for t in range(len(q)):
        state = state * decays[t]
        held = (state * k[t, :, :, None]).sum(1)  # [heads, Dv]: what the key finds
        change = (v[t] - held) * strength[t, :, None]
        state = state + k[t, :, :, None] * change[:, None]
        out[t] = (state * q[t, :, :, None]).sum(1)
    return out, state


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once. With c the running sum of g, token i finds what token j <= i
    wrote, times exp(c_i - c_j); the changes d solve (1 + A) d = b (v - exp(c) kᵀ S)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, T, D]
    b, total = strength.T[..., None], g.T.cumsum(-1)  # [heads, T, 1], [heads, T]
    T = q.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    between = (total[:, :, None] - total[:, None]).masked_fill(~seen, -torch.inf).exp()
    system = (k * b) @ k.transpose(1, 2) * between
    since = total.exp()[..., None]
    wanted = b * (v - since * (k @ state))
    change = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = since * (q @ state) + (q @ k.transpose(1, 2) * between) @ change
    left = (total[:, -1:] - total).exp()[..., None]
    state = state * total[:, -1].exp()[:, None, None] + (k * left).transpose(1, 2) @ change
    return out.transpose(0, 1), state
