"""Attention whose queries and keys pass convolutions over the last tokens, and whose values are in
part those of the token before (compressed convolutional attention, arXiv 2510.04476)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moescope.engine.mlx_operators.attention import CachedAttention
from moescope.engine.mlx_operators.common import Call, Held, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.recurrent import of_lanes, with_lanes
from moescope.engine.mlx_operators.rope import rotate
from moescope.engine.operators import Attention, ConvolvedAttention


class MLXConvolvedAttention(CachedAttention):
    """Beside keys and values a lane keeps the last projections [lanes, channels, tail], whose
    channels are queries, keys, and the half of the values that the next token takes."""

    def __init__(self, spec: ConvolvedAttention, weights: Weights, path: str, dtype: str) -> None:
        plain = Attention(
            *(spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.rope),
            window=spec.window,
        )
        super().__init__(plain, dtype)
        self.own = spec
        self.wide = (spec.heads + spec.kv_heads) * spec.head_dim
        self.half = spec.kv_heads * spec.head_dim // 2
        self.qkv, self.out = (matrix(weights[f"{path}.{n}.weight"]) for n in ("qkv", "o_proj"))
        self.qkv_bias = array(weights[f"{path}.qkv.bias"]) if spec.qkv_bias else None
        self.out_bias = array(weights[f"{path}.o_proj.bias"]) if spec.out_bias else None
        self.channels, self.heads = (
            tuple(array(weights[f"{path}.{n}_conv.{kind}"]) for kind in ("weight", "bias"))
            for n in ("channel", "head")
        )
        self.key_scale = array(weights[f"{path}.key_scale"])

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        """Keys and values of every token, and the window."""
        shape = (lanes, self.wide + self.half, self.own.tail)
        return (*super().state(lanes, capacity), Held(shape, self.dtype, per_token=False))

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s, R = self.spec, len(h)
        qkv = self.qkv(h, self.qkv_bias)
        qk, now, late = mx.split(qkv, [self.wide, self.wide + self.half], -1)
        *cached, window = call.state
        mixed, before, window = self._with_past(mx.concatenate([qk, late], -1), window, call)
        qk = self._scaled(mixed.reshape(R, -1, s.head_dim) + self._means(qk))
        if s.rope is not None:
            qk = rotate(qk, s.rope, call.rotations[id(s.rope)])
        v = mx.concatenate([now, before], -1).reshape(R, s.kv_heads, s.head_dim)
        call.state = cached
        attended = self.attend(qk[:, : s.heads], qk[:, s.heads :], v, call)
        call.state = [*call.state, window]
        return self.out(attended, self.out_bias)

    def _with_past(
        self, fed: mx.array, window: mx.array, call: Call
    ) -> tuple[mx.array, mx.array, mx.array]:
        """fed [R, channels] after what each lane saw before it -> queries and keys convolved [R,
        wide], the halves of the values that came a token earlier [R, half], and the window then."""
        lanes, T, tail = call.static.lanes, call.static.tokens, self.own.tail
        rows = fed.reshape(len(lanes), T, -1).swapaxes(1, 2)  # [N, channels, T]
        inputs = mx.concatenate([of_lanes(window, lanes), rows], -1)
        window = with_lanes(window, lanes, inputs[..., T:])
        before = inputs[:, self.wide :, tail - 1 : tail - 1 + T]
        before = before.swapaxes(1, 2).reshape(len(fed), -1)
        if self.qkv_bias is not None:  # before the first token there is a bias
            before = mx.where(call.positions[:, None] == 0, self.qkv_bias[-self.half :], before)
        taps = self.own.channel_kernel + self.own.head_kernel - 2
        mixed = self._over_heads(self._over_channels(inputs[:, : self.wide, tail - taps :]))
        return mixed.swapaxes(1, 2).reshape(len(fed), -1), before, window

    def _over_channels(self, x: mx.array) -> mx.array:
        """x [N, wide, T] -> [N, wide, T + 1 - kernel], every channel by itself."""
        (weight, bias), kernel = self.channels, self.own.channel_kernel
        T = x.shape[-1] + 1 - kernel
        taps, x = weight.astype(mx.float32), x.astype(mx.float32)
        out = bias.astype(mx.float32)[:, None]
        for at in range(kernel):
            out = out + x[..., at : at + T] * taps[:, at : at + 1]
        return out.astype(self.dtype)

    def _over_heads(self, x: mx.array) -> mx.array:
        """x [N, wide, T] -> [N, wide, T + 1 - kernel], over the channels of each head."""
        (weight, bias), kernel, D = self.heads, self.own.head_kernel, self.own.head_dim
        T = x.shape[-1] + 1 - kernel
        taps = weight.astype(mx.float32).reshape(-1, D, D, kernel)
        heads = x.astype(mx.float32).reshape(len(x), -1, D, x.shape[-1])
        out = bias.astype(mx.float32).reshape(-1, D, 1)
        for at in range(kernel):
            out = out + taps[..., at] @ heads[..., at : at + T]
        return out.astype(self.dtype).reshape(len(x), -1, T)

    def _means(self, qk: mx.array) -> mx.array:
        """qk [R, wide] -> [R, heads + kv heads, D]: for each query its mean with the key, for each
        key the mean of that over its queries."""
        s, R = self.spec, len(qk)
        q, k = mx.split(qk, [s.heads * s.head_dim], -1)
        q = q.reshape(R, s.kv_heads, -1, s.head_dim)
        pairs = (q + k.reshape(R, s.kv_heads, 1, s.head_dim)) * 0.5
        keys = pairs.astype(mx.float32).mean(2).astype(pairs.dtype)
        return mx.concatenate([pairs.flatten(1, 2), keys], 1)

    def _scaled(self, qk: mx.array) -> mx.array:
        """Queries and keys of length sqrt(D), keys times their head's scale."""
        s = self.spec
        length = mx.linalg.norm(qk.astype(mx.float32), axis=-1, keepdims=True).astype(qk.dtype)
        qk = qk * (s.head_dim**0.5 / mx.maximum(length, mx.finfo(qk.dtype).eps))
        keys = qk[:, s.heads :] * self.key_scale[:, None]
        return mx.concatenate([qk[:, : s.heads], keys], 1)
