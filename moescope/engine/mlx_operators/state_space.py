"""Selective state spaces: Mamba and Mamba 2.

A head (Mamba 2) or channel (Mamba) keeps h <- exp(dt A) h + dt B x and gives C·h + D x, with A and
D learned, and dt, B, C from the token (arXiv 2312.00752, 2405.21060).
"""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.mlx_operators.activations import silu, softplus
from moescope.engine.mlx_operators.common import Call, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.norms import load_norm
from moescope.engine.mlx_operators.recurrent import Recurrent, of_lanes, with_lanes
from moescope.engine.operators import StateSpace

CHUNK = 64
FEW = 4  # tokens that are cheaper one by one


class _StateSpace(Recurrent):
    """What both share: a projection in, a convolution, and a projection out."""

    def __init__(
        self,
        spec: StateSpace,
        weights: Weights,
        path: str,
        dtype: str,
        channels: int,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__(channels, spec.conv_kernel, shape, dtype)
        self.spec = spec
        self.inner, self.out = (
            matrix(weights[f"{path}.{name}.weight"]) for name in ("in_proj", "out_proj")
        )
        self.inner_bias, self.out_bias = (
            array(weights[f"{path}.{name}.bias"]) if spec.bias else None
            for name in ("in_proj", "out_proj")
        )
        self.conv = array(weights[f"{path}.conv.weight"])
        self.conv_bias = array(weights[f"{path}.conv.bias"]) if spec.conv_bias else None
        self.rate = -mx.exp(array(weights[f"{path}.A_log"]).astype(mx.float32))
        self.skip = array(weights[f"{path}.D"]).astype(mx.float32)


class Mamba2(_StateSpace):
    """One decay a head; B and C shared by the heads of a group."""

    def __init__(self, spec: StateSpace, weights: Weights, path: str, dtype: str) -> None:
        self.bc = spec.groups * spec.state_size
        shape = (spec.heads, spec.head_dim, spec.state_size)
        super().__init__(spec, weights, path, dtype, spec.inner + 2 * self.bc, shape)
        self.dt_bias = array(weights[f"{path}.dt_bias"])
        self.norm = None
        if spec.gated_norm is not None:
            self.norm = array(weights[f"{path}.norm.weight"]).astype(mx.float32)

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s = self.spec
        ends = [s.inner, 2 * s.inner + 2 * self.bc]
        gate, xbc, dt = mx.split(self.inner(h, self.inner_bias), ends, -1)
        dt = mx.clip(softplus(dt + self.dt_bias), s.dt_floor, s.dt_ceiling).astype(mx.float32)
        convolved = self.convolve(xbc, self.conv, self.conv_bias, call, silu)
        mixed = self._scan(convolved.astype(mx.float32), dt, call)  # [R, inner] float32
        return self.out(self._gated(mixed, gate).astype(h.dtype), self.out_bias)

    def _scan(self, xbc: mx.array, dt: mx.array, call: Call) -> mx.array:
        s, lanes, T = self.spec, call.static.lanes, call.static.tokens
        N = len(lanes)
        x, b, c = mx.split(xbc, [s.inner, s.inner + self.bc], -1)
        x, dt = x.reshape(N, T, s.heads, s.head_dim), dt.reshape(N, T, s.heads)
        b, c = (
            mx.repeat(y.reshape(N, T, s.groups, s.state_size), s.heads // s.groups, 2)
            for y in (b, c)
        )
        state = of_lanes(call.state[1], lanes)
        out, after = selective_scan(x * dt[..., None], dt * self.rate, b, c, state)
        call.state[1] = with_lanes(call.state[1], lanes, after)
        return (out + self.skip[:, None] * x).reshape(N * T, s.inner)

    def _gated(self, mixed: mx.array, gate: mx.array) -> mx.array:
        """The gate, then a norm over each group of channels."""
        mixed = mixed * silu(gate.astype(mx.float32))
        norm = self.spec.gated_norm
        if norm is None or self.norm is None:
            return mixed
        groups = mixed.reshape(len(mixed), -1, self.spec.inner // self.spec.groups)
        groups = groups * mx.rsqrt(mx.square(groups).mean(-1, keepdims=True) + norm.eps)
        return self.norm * groups.reshape(mixed.shape)


def selective_scan(
    x: mx.array, decay: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """T tokens of N lanes after `state` [N, heads, D, S]: outputs [N, T, heads, D] and the state
    then. x [N, T, heads, D], log decay [N, T, heads], b and c [N, T, heads, S], all float32."""
    T = x.shape[1]
    few = T <= FEW
    size = FEW if few else CHUNK
    parts = []
    for at in range(0, T, size):
        rows = slice(at, at + size)
        some = x[:, rows], decay[:, rows], b[:, rows], c[:, rows], state
        out, state = _one_by_one(*some) if few else _chunk(*some)
        parts.append(out)
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, 1)), state


def _one_by_one(
    x: mx.array, decay: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    keeps = mx.exp(decay)[..., None, None]
    outs = []
    for t in range(x.shape[1]):
        state = state * keeps[:, t] + x[:, t, :, :, None] * b[:, t, :, None]
        outs.append((state * c[:, t, :, None]).sum(-1))
    return mx.stack(outs, 1), state


def _chunk(
    x: mx.array, decay: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """All tokens of a chunk at once: what token j wrote reaches token i times exp(s_i - s_j), with
    s the running sum of the log decay."""
    T = x.shape[1]
    x, b, c = (y.swapaxes(1, 2) for y in (x, b, c))  # [N, heads, T, .]
    total = mx.cumsum(decay.swapaxes(1, 2), -1)  # [N, heads, T]
    seen = mx.tril(mx.ones((T, T), mx.bool_))
    between = mx.exp(mx.where(seen, total[..., :, None] - total[..., None, :], -mx.inf))
    since = mx.exp(total)[..., None]
    out = (c @ b.swapaxes(2, 3) * between) @ x + since * (c @ state.swapaxes(2, 3))
    left = mx.exp(total[..., -1:] - total)[..., None]
    state = state * mx.exp(total[..., -1])[..., None, None] + (x * left).swapaxes(2, 3) @ b
    return out.swapaxes(1, 2), state


class Mamba1(_StateSpace):
    """A decay for every channel and state, and norms of dt, B and C (Jamba)."""

    def __init__(self, spec: StateSpace, weights: Weights, path: str, dtype: str) -> None:
        shape = (spec.inner, spec.state_size)
        super().__init__(spec, weights, path, dtype, spec.inner, shape)
        self.select = matrix(weights[f"{path}.x_proj.weight"])  # rows of dt, B, C
        self.dt = matrix(weights[f"{path}.dt_proj.weight"])
        self.dt_bias = array(weights[f"{path}.dt_proj.bias"]).astype(mx.float32)
        self.norms = [load_norm(n, weights, f"{path}.{name}") for name, n in spec.select_norms()]

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        x, gate = mx.split(self.inner(h, self.inner_bias), 2, -1)
        convolved = self.convolve(x, self.conv, self.conv_bias, call, silu)
        mixed = self._scan(convolved, call) * silu(gate.astype(mx.float32))
        return self.out(mixed.astype(h.dtype), self.out_bias)

    def _scan(self, x: mx.array, call: Call) -> mx.array:
        """x [R, inner], one token after the other."""
        s, lanes, T = self.spec, call.static.lanes, call.static.tokens
        ends = [s.dt_rank, s.dt_rank + s.state_size]
        selected = mx.split(self.select(x), ends, -1)
        dt, b, c = (
            y if norm is None else norm(y) for y, norm in zip(selected, self.norms, strict=True)
        )
        dt = softplus(self.dt(dt).astype(mx.float32) + self.dt_bias)
        wide = (y.astype(mx.float32) for y in (x, dt, b, c))
        x, dt, b, c = (y.reshape(len(lanes), T, -1) for y in wide)
        state = of_lanes(call.state[1], lanes)  # [N, inner, S]
        outs = []
        for t in range(T):
            kept = mx.exp(dt[:, t, :, None] * self.rate) * state
            state = kept + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            outs.append((state * c[:, t, None]).sum(-1))
        call.state[1] = with_lanes(call.state[1], lanes, state)
        return (mx.stack(outs, 1) + self.skip * x).reshape(len(lanes) * T, -1)
