"""Attention whose query and output projections are experts (JetMoE's mixture of attention heads).

Every expert a token chose asks with queries of its own; keys and values are the same for all.
"""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.mlx_operators.attention import CachedAttention
from moescope.engine.mlx_operators.common import DTYPES, Call, Weights
from moescope.engine.mlx_operators.experts import readable, summed, through
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.moe import MLXRouter
from moescope.engine.mlx_operators.rope import rotate
from moescope.engine.operators import Attention, RoutedAttention


class MLXRoutedAttention(CachedAttention):
    """Weights queries [E, kv heads × D, H] and out [E, H, kv heads × D]."""

    def __init__(
        self, spec: RoutedAttention, weights: Weights, path: str, dtype: str, index: int
    ) -> None:
        heads = spec.kv_heads * spec.router.K
        super().__init__(
            Attention(spec.hidden, heads, spec.kv_heads, spec.head_dim, spec.scale, spec.rope),
            dtype,
        )
        self.experts = spec.router.wiring.num_experts
        self.router = MLXRouter(spec, weights, path, index)
        self.combine = DTYPES[spec.router.wiring.combine_dtype]
        self.queries, self.out = (
            matrix(weights[f"{path}.experts.{name}"]) for name in ("queries", "out")
        )
        self.kv = matrix(weights[f"{path}.kv_proj.weight"])
        self.output_bias = array(weights[f"{path}.output_bias"]) if spec.output_bias else None

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s, R = self.spec, len(h)
        ids, weights = self.router(h, call)
        order = mx.argsort(ids, -1)
        ids, weights = (mx.take_along_axis(a, order, -1) for a in (ids, weights))
        used, ids = readable(ids, self.experts)
        K = ids.shape[1]
        keys, values = (x.reshape(R, s.kv_heads, -1) for x in mx.split(self.kv(h), 2, -1))
        q = through(h[:, None], ids, lambda x, e, asc: self.queries.of_experts(x, e, ordered=asc))
        q = q.reshape(R, K, s.kv_heads, -1).swapaxes(1, 2).reshape(R, K * s.kv_heads, -1)
        if s.rope is not None:
            q, keys = (rotate(x, s.rope, call.rotations[id(s.rope)]) for x in (q, keys))
        mixed = self.attend(q, keys, values, call).reshape(R, s.kv_heads, K, -1)
        mixed = mixed.swapaxes(1, 2).reshape(R, K, -1)
        parts = through(mixed, ids, lambda x, e, asc: self.out.of_experts(x, e, ordered=asc))
        parts = (parts * weights.astype(self.combine)[..., None]).astype(h.dtype)
        out = self.router.scaled(summed(parts, used), call)
        return out if self.output_bias is None else out + self.output_bias
