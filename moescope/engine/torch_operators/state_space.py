"""Selective state spaces: Mamba and Mamba 2.

A head (Mamba 2) or channel (Mamba) keeps h <- exp(dt A) h + dt B x and gives C·h + D x, with A and
D learned, and dt, B, C from the token (arXiv 2312.00752, 2405.21060).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import StateSpace
from moescope.engine.torch_operators.common import Call, Weights, linear, split
from moescope.engine.torch_operators.norms import load_norm
from moescope.engine.torch_operators.recurrent import Recurrent

CHUNK = 64
FEW = 4  # tokens that are cheaper one by one


class Mamba2(Recurrent):
    """One decay a head; B and C shared by the heads of a group."""

    def __init__(self, spec: StateSpace, weights: Weights, path: str, dtype: torch.dtype) -> None:
        self.spec = spec
        self.bc = spec.groups * spec.state_size
        channels = spec.inner + 2 * self.bc
        super().__init__(
            channels, spec.conv_kernel, (spec.heads, spec.head_dim, spec.state_size), dtype
        )
        self.inner = weights[f"{path}.in_proj.weight"]  # rows of the gate, x, B, C, dt
        self.inner_bias = weights.get(f"{path}.in_proj.bias")
        self.conv, self.conv_bias = weights[f"{path}.conv.weight"], weights.get(f"{path}.conv.bias")
        self.rate = -weights[f"{path}.A_log"].float().exp()
        self.skip, self.dt_bias = weights[f"{path}.D"].float(), weights[f"{path}.dt_bias"]
        self.norm = weights.get(f"{path}.norm.weight")
        self.out, self.out_bias = (
            weights[f"{path}.out_proj.weight"],
            weights.get(f"{path}.out_proj.bias"),
        )

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        gate, xbc, dt = self.inputs(h)
        parts = []
        for lane, _, rows in call.spans():
            convolved = self.convolve(lane, xbc[rows], self.conv, self.conv_bias, F.silu)
            out, self.matrix[lane] = self._scan(convolved.float(), dt[rows], self.matrix[lane])
            parts.append(out)
        return self.finish(torch.cat(parts), gate)

    def inputs(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, what is convolved, and the steps dt [R, heads] float32."""
        s = self.spec
        sizes = (s.inner, s.inner + 2 * self.bc, s.heads)
        gate, xbc, dt = split(linear(h, self.inner, self.inner_bias), *sizes)
        return gate, xbc, F.softplus(dt + self.dt_bias).clamp(s.dt_floor, s.dt_ceiling).float()

    def finish(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """mixed [R, inner] float32, gated and normed -> [R, H]."""
        return linear(self._gated(mixed, gate).to(gate.dtype), self.out, self.out_bias)

    def _scan(self, xbc: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = self.selected(xbc)
        out, state = selective_scan(x * dt[..., None], dt * self.rate, b, c, state)
        return (out + self.skip[:, None] * x).flatten(1), state

    def selected(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, heads, D], B and C [R, heads, N] of convolved rows."""
        s, R = self.spec, len(xbc)
        x, b, c = split(xbc, s.inner, self.bc, self.bc)
        b, c = (
            y.reshape(R, s.groups, s.state_size).repeat_interleave(s.heads // s.groups, 1)
            for y in (b, c)
        )
        return x.reshape(R, s.heads, s.head_dim), b, c

    def _gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """The gate, then a norm over each group of channels."""
        mixed = mixed * F.silu(gate.float())
        norm = self.spec.gated_norm
        if norm is None or self.norm is None:
            return mixed
        groups = mixed.view(len(mixed), -1, self.spec.inner // self.spec.groups)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + norm.eps)
        return self.norm.float() * groups.view_as(mixed)


def selective_scan(
    x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """T tokens after `state` [heads, D, N]: outputs [T, heads, D] and the state then. x [T, heads,
    D], log decay [T, heads], b and c [T, heads, N], all float32."""
    step = _one_by_one if len(x) <= FEW else _chunk
    size = FEW if len(x) <= FEW else CHUNK
    parts = []
    for at in range(0, len(x), size):
        rows = slice(at, at + size)
        out, state = step(x[rows], decay[rows], b[rows], c[rows], state)
        parts.append(out)
    return torch.cat(parts), state


def _one_by_one(
    x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    keeps = decay.exp()[..., None, None]
    for t in range(len(x)):
        state = state * keeps[t] + x[t, :, :, None] * b[t, :, None]
        out[t] = (state * c[t, :, None]).sum(-1)
    return out, state


def _chunk(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once: what token j wrote reaches token i times exp(s_i - s_j), with
    s the running sum of the log decay."""
    x, b, c = (y.transpose(0, 1) for y in (x, b, c))  # [heads, T, .]
    total = decay.T.cumsum(-1)  # [heads, T]
    T = x.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    between = (total[:, :, None] - total[:, None]).masked_fill(~seen, -torch.inf).exp()
    since = total.exp()[..., None]
    out = (c @ b.transpose(1, 2) * between) @ x + since * (c @ state.transpose(1, 2))
    left = (total[:, -1:] - total).exp()[..., None]
    state = state * total[:, -1].exp()[:, None, None] + (x * left).transpose(1, 2) @ b
    return out.transpose(0, 1), state


class Mamba1(Recurrent):
    """A decay for every channel and state, and norms of dt, B and C (Jamba)."""

    def __init__(self, spec: StateSpace, weights: Weights, path: str, dtype: torch.dtype) -> None:
        self.spec = spec
        super().__init__(spec.inner, spec.conv_kernel, (spec.inner, spec.state_size), dtype)
        self.inner = weights[f"{path}.in_proj.weight"]  # rows of x, then the gate
        self.inner_bias = weights.get(f"{path}.in_proj.bias")
        self.conv, self.conv_bias = weights[f"{path}.conv.weight"], weights.get(f"{path}.conv.bias")
        self.select = weights[f"{path}.x_proj.weight"]  # rows of dt, B, C
        self.dt, self.dt_bias = weights[f"{path}.dt_proj.weight"], weights[f"{path}.dt_proj.bias"]
        self.rate, self.skip = -weights[f"{path}.A_log"].float().exp(), weights[f"{path}.D"].float()
        self.norms = [load_norm(n, weights, f"{path}.{name}") for name, n in spec.select_norms()]
        self.out, self.out_bias = (
            weights[f"{path}.out_proj.weight"],
            weights.get(f"{path}.out_proj.bias"),
        )

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        x, gate = linear(h, self.inner, self.inner_bias).chunk(2, -1)
        parts = []
        for lane, _, rows in call.spans():
            convolved = self.convolve(lane, x[rows], self.conv, self.conv_bias, F.silu)
            out, self.matrix[lane] = self._scan(convolved, self.matrix[lane])
            parts.append(out)
        mixed = torch.cat(parts) * F.silu(gate.float())
        return linear(mixed.to(h.dtype), self.out, self.out_bias)

    def _scan(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, inner], one token after the other."""
        dt, b, c = self.selected(x)
        x = x.float()
        out = torch.empty_like(x)
        for t in range(len(x)):
            state = torch.exp(dt[t, :, None] * self.rate) * state + (dt[t] * x[t])[:, None] * b[t]
            out[t] = state @ c[t]
        return out + self.skip * x, state

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [R, inner], B and C [R, N] of convolved rows, in float32."""
        s = self.spec
        selected = split(linear(x, self.select), s.dt_rank, s.state_size, s.state_size)
        dt, b, c = (
            y if norm is None else norm(y) for y, norm in zip(selected, self.norms, strict=True)
        )
        dt = F.softplus(linear(dt, self.dt).float() + self.dt_bias.float())
        return dt, b.float(), c.float()
