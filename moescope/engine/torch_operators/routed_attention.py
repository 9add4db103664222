"""Attention whose query and output projections are experts (JetMoE's mixture of attention heads).

Every expert a token chose asks with queries of its own; keys and values are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moescope.engine.operators import Attention, RoutedAttention
from moescope.engine.torch_operators.attention import CachedAttention
from moescope.engine.torch_operators.common import DTYPES, Call, Weights, linear
from moescope.engine.torch_operators.moe import TorchRouter
from moescope.engine.torch_operators.rope import rotate


class TorchRoutedAttention(CachedAttention):
    """Weights queries [E, kv heads × D, H] and out [E, H, kv heads × D]."""

    def __init__(
        self, spec: RoutedAttention, weights: Weights, path: str, dtype: torch.dtype, index: int
    ) -> None:
        plain = Attention(
            *(spec.hidden, spec.kv_heads * spec.router.K, spec.kv_heads, spec.head_dim),
            *(spec.scale, spec.rope),
        )
        super().__init__(plain, dtype)
        self.router = TorchRouter(spec, weights, path, index)
        self.combine = DTYPES[spec.router.wiring.combine_dtype]
        self.queries = weights[f"{path}.experts.queries"].unbind(0)
        self.out = weights[f"{path}.experts.out"].unbind(0)
        self.kv = weights[f"{path}.kv_proj.weight"]
        self.output_bias = weights.get(f"{path}.output_bias")

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        s, R = self.spec, len(h)
        routing = self.router(h, call)
        ids = routing.expert_ids
        K, wide = ids.shape[1], s.kv_heads * s.head_dim
        keys, values = linear(h, self.kv).chunk(2, -1)
        q = self._ask(h, ids).view(R, K, s.kv_heads, s.head_dim).transpose(1, 2)
        qk = torch.cat((q.flatten(1), keys), -1).view(R, -1, s.head_dim)
        if s.rope is not None:
            qk = rotate(qk, s.rope, call.rotations[id(s.rope)])
        mixed = self.attend(qk, values.reshape(R, s.kv_heads, s.head_dim), call)
        mixed = mixed.view(R, s.kv_heads, K, s.head_dim).transpose(1, 2).reshape(R, K, wide)
        out = self._answer(mixed, ids, routing.weights.to(self.combine))
        return out if self.output_bias is None else out + self.output_bias

    def _ask(self, h: Tensor, ids: Tensor) -> Tensor:
        """h [R, H] -> the queries [R, K, kv heads × D] of the experts chosen; 0 where there are
        none."""
        s = self.spec
        q = h.new_zeros(*ids.shape, s.kv_heads * s.head_dim)
        for e, rows, places in _chosen(ids):
            q[rows, places] = linear(h[rows], self.queries[e])
        return q

    def _answer(self, mixed: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """mixed [R, K, kv heads × D] -> [R, H], weighted; experts ascending."""
        out = mixed.new_zeros(len(mixed), self.spec.hidden)
        for e, rows, places in _chosen(ids):
            part = linear(mixed[rows, places], self.out[e])
            out.index_add_(0, rows, (part * weights[rows, places, None]).to(out.dtype))
        return out


def _chosen(ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, rows, places among the K) for every expert that ids [R, K] hold."""
    for e in torch.unique(ids[ids >= 0]).tolist():
        yield e, *torch.where(ids == e)
