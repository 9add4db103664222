"""Linear attention by the gated delta rule, with one decay a head or one a channel (KDA).

A head keeps a matrix S [Dk, Dv]. With decay a = exp(g), write strength b, key k and value v, a
token makes S <- a S + k (b (v - kᵀ a S))ᵀ and reads qᵀ S (arXiv 2412.06464, equation 10; arXiv
2510.26692 for a decay of every channel). Prompts go in chunks: within one, the corrections of all
tokens are the solution of a unit triangular system.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from moescope.engine.mlx_operators.activations import silu, softplus
from moescope.engine.mlx_operators.common import Call, Weights
from moescope.engine.mlx_operators.matrix import Matrix, array, matrix
from moescope.engine.mlx_operators.recurrent import Recurrent, of_lanes, with_lanes
from moescope.engine.operators import LinearAttention

CHUNK = 64
FEW = 8  # tokens that are cheaper one by one
GATES: dict[str, Callable[[mx.array], mx.array]] = {"silu": silu, "sigmoid": mx.sigmoid}


class _Delta(Recurrent):
    """What both kinds share: convolved q, k, v, the scan, and a gated norm before the output."""

    def __init__(self, spec: LinearAttention, weights: Weights, path: str, dtype: str) -> None:
        self.spec = spec
        self.keys = spec.key_heads * spec.key_dim
        self.values = spec.value_heads * spec.value_dim
        shape = (spec.value_heads, spec.key_dim, spec.value_dim)
        super().__init__(2 * self.keys + self.values, spec.conv_kernel, shape, dtype)
        self.conv = array(weights[f"{path}.conv.weight"])
        self.decay_rate = mx.exp(array(weights[f"{path}.A_log"]).astype(mx.float32)).flatten()
        self.dt_bias = array(weights[f"{path}.dt_bias"]).astype(mx.float32).flatten()
        self.norm = array(weights[f"{path}.norm.weight"])
        self.out = matrix(weights[f"{path}.out_proj.weight"])

    def mix(self, qkv: mx.array, g: mx.array, strength: mx.array, call: Call) -> mx.array:
        """qkv [R, channels], g [R, value heads] or [.., Dk], strength [R, value heads] -> [R, value
        heads, Dv]."""
        lanes = call.static.lanes
        N, T = len(lanes), call.static.tokens
        convolved = self.convolve(qkv, self.conv, None, call, silu)
        parts = (*self._heads(convolved), g.astype(mx.float32), strength.astype(mx.float32))
        q, k, v, g, strength = (x.reshape(N, T, *x.shape[1:]) for x in parts)
        out, after = delta_rule(q, k, v, g, strength, of_lanes(call.state[1], lanes))
        call.state[1] = with_lanes(call.state[1], lanes, after)
        return out.reshape(N * T, *out.shape[2:]).astype(qkv.dtype)

    def _heads(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """float32 [R, value heads, D]: a query head serves consecutive value heads."""
        s, R = self.spec, len(qkv)
        q, k, v = mx.split(qkv.astype(mx.float32), [self.keys, 2 * self.keys], -1)
        group = s.value_heads // s.key_heads
        q, k = (mx.repeat(_unit(x.reshape(R, s.key_heads, -1)), group, 1) for x in (q, k))
        return q * s.key_dim**-0.5, k, v.reshape(R, s.value_heads, -1)

    def finish(self, mixed: mx.array, gate: mx.array) -> mx.array:
        """The norm of every head, the gate, and the output's projection."""
        norm, wide = self.spec.out_norm, mixed.astype(mx.float32)
        wide = wide * mx.rsqrt(mx.square(wide).mean(-1, keepdims=True) + norm.eps)
        if norm.applies == "model":
            wide = self.norm * wide.astype(mixed.dtype)
        else:
            wide = self.norm.astype(mx.float32) * wide
        gate = GATES[self.spec.out_gate](gate.reshape(mixed.shape).astype(mx.float32))
        return self.out((wide * gate).astype(mixed.dtype).flatten(1))


class GatedDelta(_Delta):
    """One decay a head (Qwen3-Next)."""

    def __init__(self, spec: LinearAttention, weights: Weights, path: str, dtype: str) -> None:
        super().__init__(spec, weights, path, dtype)
        self.qkvz = matrix(weights[f"{path}.in_proj_qkvz.weight"])  # q, k, v, then the gate z
        self.ba = matrix(weights[f"{path}.in_proj_ba.weight"])  # write strengths, then decays

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        strength, a = mx.split(self.ba(h), 2, -1)
        g = -self.decay_rate * softplus(a.astype(mx.float32) + self.dt_bias)
        qkv, z = mx.split(self.qkvz(h), [2 * self.keys + self.values], -1)
        return self.finish(self.mix(qkv, g, mx.sigmoid(strength), call), z)


class KimiDelta(_Delta):
    """One decay a channel, and a gate through a narrow layer (Kimi Linear)."""

    def __init__(self, spec: LinearAttention, weights: Weights, path: str, dtype: str) -> None:
        super().__init__(spec, weights, path, dtype)
        self.qkv, self.strength = (
            matrix(weights[f"{path}.{name}.weight"]) for name in ("qkv", "strength")
        )
        self.forget, self.gate = (
            [
                matrix(weights[name])
                for half in "ab"
                if (name := f"{path}.{kind}_{half}.weight") in weights
            ]
            for kind in ("forget", "gate")
        )

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s = self.spec
        forget = _through(h, self.forget).astype(mx.float32) + self.dt_bias
        forget = forget.reshape(len(h), s.value_heads, s.key_dim)
        rate = self.decay_rate[:, None]
        floor = s.decay_floor
        g = floor * mx.sigmoid(rate * forget) if floor else -rate * softplus(forget)
        mixed = self.mix(self.qkv(h), g, mx.sigmoid(self.strength(h)), call)
        return self.finish(mixed, _through(h, self.gate))


def _through(h: mx.array, products: list[Matrix]) -> mx.array:
    """One product, or two by way of a narrow layer."""
    for product in products:
        h = product(h)
    return h


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(mx.square(x).sum(-1, keepdims=True) + 1e-6)


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, strength: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """T tokens of N lanes after `state` [N, heads, Dk, Dv]: their outputs [N, T, heads, Dv], and
    the state then.

    q and k [N, T, heads, Dk], v [N, T, heads, Dv], strength [N, T, heads] and the log decay g [N,
    T, heads] or [N, T, heads, Dk], all float32.
    """
    T = q.shape[1]
    alone = g.ndim == 4 or T <= FEW
    size = FEW if alone else CHUNK
    parts = []
    for at in range(0, T, size):
        rows = slice(at, at + size)
        some = q[:, rows], k[:, rows], v[:, rows], g[:, rows], strength[:, rows], state
        out, state = _one_by_one(*some) if alone else _chunk(*some)
        parts.append(out)
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, 1)), state


def _one_by_one(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, strength: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    decays = mx.exp(g)[..., None] if g.ndim == 4 else mx.exp(g)[..., None, None]
    outs = []
    for t in range(q.shape[1]):
        key = k[:, t, :, :, None]
        state = state * decays[:, t]
        found = (state * key).sum(2)  # [N, heads, Dv]: what the key finds
        change = (v[:, t] - found) * strength[:, t, :, None]
        state = state + key * change[:, :, None]
        outs.append((state * q[:, t, :, :, None]).sum(2))
    return mx.stack(outs, 1), state


def _chunk(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, strength: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """All tokens of a chunk at once. With c the running sum of g, token i finds what token j <= i
    wrote, times exp(c_i - c_j); the changes d solve (1 + A) d = b (v - exp(c) kᵀ S)."""
    T = q.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [N, heads, T, D]
    b, total = strength.swapaxes(1, 2)[..., None], mx.cumsum(g.swapaxes(1, 2), -1)
    seen = mx.tril(mx.ones((T, T), mx.bool_))
    between = mx.exp(mx.where(seen, total[..., :, None] - total[..., None, :], -mx.inf))
    below = mx.tril(mx.ones((T, T), mx.bool_), -1)
    system = mx.where(below, (k * b) @ k.swapaxes(2, 3) * between, 0.0) + mx.eye(T)
    since = mx.exp(total)[..., None]
    wanted = b * (v - since * (k @ state))
    change = mx.linalg.solve_triangular(system, wanted, stream=mx.cpu)
    out = since * (q @ state) + (q @ k.swapaxes(2, 3) * between) @ change
    left = mx.exp(total[..., -1:] - total)[..., None]
    state = state * mx.exp(total[..., -1])[..., None, None] + (k * left).swapaxes(2, 3) @ change
    return out.swapaxes(1, 2), state
