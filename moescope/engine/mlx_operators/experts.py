"""The routed experts: chosen ones are multiplied where they lie, and no copies are gathered."""

from __future__ import annotations

import mlx.core as mx

from moescope.engine.decoder import MoE
from moescope.engine.mlx_operators.common import DTYPES, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.mlx_operators.mlp import make_activation

SORT_FROM = 64  # picks in a call from which rows are sorted by expert


class MLXExperts:
    """Weights gate_up [E, 2I, H] (gate rows first; [E, I, H] without a gate) and down [E, H, I];
    biases [E, 2I] and [E, H] are the expert's own, so the combine weight multiplies them too."""

    def __init__(self, spec: MoE, weights: Weights, path: str) -> None:
        self.wiring = spec.router.wiring
        self.activation = make_activation(spec.experts)
        self.gate_up = matrix(weights[f"{path}.gate_up"])
        self.down = matrix(weights[f"{path}.down"])
        self.gate_up_bias, self.down_bias = (
            array(weights[f"{path}.{name}"]) if spec.experts.bias else None
            for name in ("gate_up_bias", "down_bias")
        )
        self.combine = DTYPES[self.wiring.combine_dtype]

    def __call__(self, h: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        """h [R, H], ids [R, K] with -1 unused, weights [R, K] -> [R, H]. Ids of null experts, which
        are those from E on, add nothing. A row's parts are added up in the order of experts."""
        order = mx.argsort(ids, -1)
        ids, weights = (mx.take_along_axis(a, order, -1) for a in (ids, weights))
        used = (ids >= 0) & (ids < self.wiring.num_experts)
        # MLX checks no index. An unused place takes an expert that the row reads anyway.
        some = mx.max(mx.where(used, ids, 0), -1, keepdims=True)
        ids = mx.where(used, ids, some)
        scale = weights.astype(self.combine)[..., None]  # [R, K, 1]
        x = mx.broadcast_to(h[:, None], (*ids.shape, h.shape[-1]))
        if self.wiring.apply_router_weight_on_input:
            x = (x * scale).astype(h.dtype)
            parts = self._products(x, ids)
        elif ids.size >= SORT_FROM:
            parts = (self._products(x, ids) * scale).astype(h.dtype)
        else:
            inner = self._inner(h[:, None, None], ids)  # [R, K, 1, I]
            parts = (self._outer(inner, ids)[..., 0, :] * scale).astype(h.dtype)
        parts = mx.where(used[..., None], parts, mx.zeros((), h.dtype))
        out = parts[:, 0]
        for k in range(1, ids.shape[1]):
            out = out + parts[:, k]
        return out

    def _products(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [R, K, H] through the expert of each place, sorted by expert -> [R, K, H]."""
        flat = ids.reshape(-1)
        order = mx.argsort(flat)
        chosen = flat[order]
        rows = x.reshape(-1, x.shape[-1])[order][:, None]  # [RK, 1, H]
        parts = self._outer(self._inner(rows, chosen, ordered=True), chosen, ordered=True)
        return parts[:, 0][mx.argsort(order)].reshape(*ids.shape, -1)

    def _inner(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        both = self.gate_up.of_experts(x, ids, ordered=ordered)
        if self.gate_up_bias is not None:
            both = both + self.gate_up_bias[ids][..., None, :]
        return self.activation(both)

    def _outer(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        out = self.down.of_experts(x, ids, ordered=ordered)
        return out if self.down_bias is None else out + self.down_bias[ids][..., None, :]
