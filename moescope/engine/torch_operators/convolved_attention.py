"""Attention whose queries and keys pass convolutions over the last tokens, and whose values are in
part those of the token before (compressed convolutional attention, arXiv 2510.04476)."""

from __future__ import annotations

import torch
from torch import Tensor

from moescope.engine.operators import Attention, ConvolvedAttention
from moescope.engine.torch_operators.attention import CachedAttention
from moescope.engine.torch_operators.common import Call, Weights, convolution, linear, split
from moescope.engine.torch_operators.recurrent import Recurrent
from moescope.engine.torch_operators.rope import rotate


class TorchConvolvedAttention(Recurrent, CachedAttention):
    """Beside keys and values a lane keeps the last projections: `window` [lanes, channels, tail],
    whose channels are queries, keys, and the half of the values that the next token takes."""

    def __init__(
        self, spec: ConvolvedAttention, weights: Weights, path: str, dtype: torch.dtype
    ) -> None:
        CachedAttention.__init__(
            self,
            Attention(
                *(spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.rope),
                window=spec.window,
            ),
            dtype,
        )
        self.wide = (spec.heads + spec.kv_heads) * spec.head_dim
        self.half = spec.kv_heads * spec.head_dim // 2
        self.taps = spec.channel_kernel + spec.head_kernel - 2
        Recurrent.__init__(self, self.wide + self.half, spec.tail + 1, (0,), dtype)
        self.qkv, self.qkv_bias = weights[f"{path}.qkv.weight"], weights.get(f"{path}.qkv.bias")
        self.convolutions = [
            tuple(weights[f"{path}.{name}_conv.{kind}"] for kind in ("weight", "bias"))
            for name in ("channel", "head")
        ]
        self.key_scale = weights[f"{path}.key_scale"]
        self.out = weights[f"{path}.o_proj.weight"], weights.get(f"{path}.o_proj.bias")

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Room for keys, values and windows, keeping what there is."""
        CachedAttention.open(self, lanes, capacity, device)
        Recurrent.open(self, lanes, capacity, device)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` rows of keys and values, and the window that `source` has now."""
        CachedAttention.copy(self, source, target, length)
        Recurrent.copy(self, source, target, length)

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        s, R = self.spec, len(h)
        qkv = linear(h, self.qkv, self.qkv_bias)
        qk, now, _ = split(qkv, self.wide, self.half, self.half)
        fed = torch.cat((qk, qkv[:, self.wide + self.half :]), -1)
        parts = [self._with_past(lane, start, fed[rows]) for lane, start, rows in call.spans()]
        mixed, before = (torch.cat(part) for part in zip(*parts, strict=True))
        qk = self.placed(mixed, qk, call)
        v = torch.cat((now, before), -1).view(R, s.kv_heads, s.head_dim)
        return linear(self.attend(qk, v, call), *self.out)

    def placed(self, mixed: Tensor, qk: Tensor, call: Call) -> Tensor:
        """Queries and keys [R, heads + kv heads, D], of what was convolved and what it was made of,
        both [R, wide]."""
        s = self.spec
        placed = self._scaled(mixed.view(len(qk), -1, s.head_dim) + self._means(qk))
        return placed if s.rope is None else rotate(placed, s.rope, call.rotations[id(s.rope)])

    def _with_past(self, lane: int, start: int, fed: Tensor) -> tuple[Tensor, Tensor]:
        """fed [T, channels] after what the lane saw before it -> queries and keys convolved [T,
        wide], and the halves of the values that came a token earlier [T, half]."""
        inputs = torch.cat((self.window[lane], fed.T), -1)  # [channels, tail + T]
        tail, T = self.window.shape[-1], len(fed)
        self.window[lane] = inputs[:, T:]
        before = inputs[self.wide :, tail - 1 : tail - 1 + T].T
        if start == 0 and self.qkv_bias is not None:  # before the first token there is a bias
            before = torch.cat((self.qkv_bias[None, -self.half :], before[1:]))
        x = inputs[None, : self.wide, tail - self.taps :]
        (channels, shift), (heads, other) = self.convolutions
        x = convolution(x, channels[:, None], shift, self.wide)
        x = convolution(x, heads, other, self.wide // self.spec.head_dim)
        return x[0].T, before

    def _means(self, qk: Tensor) -> Tensor:
        """qk [R, wide] -> [R, heads + kv heads, D]: for each query its mean with the key, for each
        key the mean of that over its queries."""
        s, R = self.spec, len(qk)
        q, k = split(qk, s.heads * s.head_dim, s.kv_heads * s.head_dim)
        pairs = q.view(R, s.kv_heads, -1, s.head_dim) + k.view(R, s.kv_heads, 1, s.head_dim)
        pairs = pairs * 0.5
        return torch.cat((pairs.flatten(1, 2), pairs.mean(2)), 1)

    def _scaled(self, qk: Tensor) -> Tensor:
        """Queries and keys of length sqrt(D), keys times their head's scale."""
        s = self.spec
        least = torch.finfo(qk.dtype).eps
        qk = qk * (s.head_dim**0.5 / qk.norm(dim=-1, keepdim=True).clamp_min(least))
        keys = qk[:, s.heads :] * self.key_scale[:, None]
        return torch.cat((qk[:, : s.heads], keys), 1)
