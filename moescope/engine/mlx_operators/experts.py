"""The routed experts: chosen ones are multiplied where they lie, and no copies are gathered."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from moescope.engine.mlx_operators.activations import make_activation
from moescope.engine.mlx_operators.common import DTYPES, Weights
from moescope.engine.mlx_operators.matrix import array, matrix
from moescope.engine.operators import MoE

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
        used, ids = readable(ids, self.wiring.num_experts)
        scale = weights.astype(self.combine)[..., None]  # [R, K, 1]
        if self.wiring.apply_router_weight_on_input:
            x = (h[:, None] * scale).astype(h.dtype)  # [R, K, H]
            parts = through(x, ids, self._products)
        else:
            parts = (through(h[:, None], ids, self._products) * scale).astype(h.dtype)
        return summed(parts, used)

    def _products(self, x: mx.array, ids: mx.array, ordered: bool) -> mx.array:
        both = self.gate_up.of_experts(x, ids, ordered=ordered)
        if self.gate_up_bias is not None:
            both = both + self.gate_up_bias[ids][..., None, :]
        out = self.down.of_experts(self.activation(both), ids, ordered=ordered)
        return out if self.down_bias is None else out + self.down_bias[ids][..., None, :]


Products = Callable[[mx.array, mx.array, bool], mx.array]  # x [.., 1, in], ids [..], do they ascend


def readable(ids: mx.array, experts: int) -> tuple[mx.array, mx.array]:
    """Which places of ids [R, K] name an expert, and ids that may be read: MLX checks no index. An
    unused place takes an expert that the row reads anyway."""
    used = (ids >= 0) & (ids < experts)
    some = mx.max(mx.where(used, ids, 0), -1, keepdims=True)
    return used, mx.where(used, ids, some)


def through(x: mx.array, ids: mx.array, products: Products) -> mx.array:
    """x [R, K or 1, in] through the expert of each place of ids [R, K] -> [R, K, out]; where they
    are many, sorted by expert, so that each one's weights are read once."""
    if ids.size < SORT_FROM:
        return products(x[:, :, None], ids, False)[..., 0, :]
    flat = ids.reshape(-1)
    order = mx.argsort(flat)
    rows = mx.broadcast_to(x, (*ids.shape, x.shape[-1])).reshape(-1, x.shape[-1])
    parts = products(rows[order][:, None], flat[order], True)  # [RK, 1, out]
    return parts[:, 0][mx.argsort(order)].reshape(*ids.shape, -1)


def summed(parts: mx.array, used: mx.array) -> mx.array:
    """parts [R, K, H] where `used` [R, K], added up; one after the other where sums are rounded."""
    parts = mx.where(used[..., None], parts, mx.zeros((), parts.dtype))
    if parts.dtype == mx.float32:
        return parts.sum(1)
    out = parts[:, 0]
    for k in range(1, parts.shape[1]):
        out = out + parts[:, k]
    return out
