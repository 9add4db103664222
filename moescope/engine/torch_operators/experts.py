"""The routed experts: each chosen one's weights are read once, and no copies are gathered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from moescope.engine.operators import Experts, MoE
from moescope.engine.torch_operators.common import DTYPES, Weights, linear
from moescope.engine.torch_operators.mlp import make_activation
from moescope.kernels import native_experts


def are_plain(experts: Experts) -> bool:
    """Whether experts are gated products without bias, clamp or shift, of the decoder's width."""
    plain = Experts(experts.width, experts.activation)
    return experts.activation != "swiglu_oai" and replace(experts, alpha=plain.alpha) == plain


def grouped_products(
    spec: MoE, gate_up: Tensor, down: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """(h [R, H], ids [R, K], weights [R, K]) -> [R, H] in a few launches, where there is a kernel:
    in Triton on CUDA, in C for bfloat16 on a CPU that multiplies it."""
    wiring, activation = spec.router.wiring, spec.experts.activation
    if not are_plain(spec.experts) or activation not in ("silu", "gelu", "gelu_tanh"):
        return None
    first = wiring.apply_router_weight_on_input
    if gate_up.is_cuda and find_spec("triton") is not None:
        from moescope.kernels.triton_ops.grouped import experts_grouped

        combine = DTYPES[wiring.combine_dtype]
        return lambda h, ids, weights: experts_grouped(
            *(h.contiguous(), gate_up, down, ids, weights),
            activation=activation,
            weight_on_input=first,
            combine_dtype=combine,
        )
    if activation == "silu" and native_experts.covers(gate_up, down):
        return lambda h, ids, weights: native_experts.experts(
            h, gate_up, down, ids, weights, weight_on_input=first
        )
    return None


class TorchExperts:
    """Weights gate_up [E, 2I, H] (gate rows first; [E, I, H] without a gate) and down [E, H, I];
    biases [E, 2I] and [E, H] are the expert's own, so the combine weight multiplies them too."""

    def __init__(self, spec: MoE, weights: Weights, path: str) -> None:
        self.wiring = spec.router.wiring
        self.activation = make_activation(spec.experts)
        gate_up, down = weights[f"{path}.gate_up"], weights[f"{path}.down"]
        self.gate_up = gate_up.unbind(0)
        self.down = down.unbind(0)
        self.gate_up_bias = _each(weights.get(f"{path}.gate_up_bias"), len(self.down))
        self.down_bias = _each(weights.get(f"{path}.down_bias"), len(self.down))
        self.combine = DTYPES[self.wiring.combine_dtype]
        self.grouped = grouped_products(spec, gate_up, down)

    def __call__(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """h [R, H], ids [R, K] with -1 unused, weights [R, K] -> [R, H]. Ids of null experts, which
        are those from E on, add nothing."""
        if self.grouped is not None:
            return self.grouped(h, ids, weights)
        weights = weights.to(self.combine)
        if h.shape[0] == 1 and not self.wiring.apply_router_weight_on_input:
            return self._one(h, ids[0].tolist(), weights[0])
        return self._many(h, ids, weights)

    def _inner(self, x: Tensor, e: int) -> Tensor:
        return linear(x, self.gate_up[e], self.gate_up_bias[e])

    def _outer(self, x: Tensor, e: int) -> Tensor:
        return linear(x, self.down[e], self.down_bias[e])

    def _one(self, h: Tensor, ids: list[int], weights: Tensor) -> Tensor:
        """One row: products per expert, everything else on all K at once. Ascending ids, as
        transformers adds them up."""
        chosen = [(e, k) for e, k in sorted(zip(ids, range(len(ids)), strict=True)) if e >= 0]
        real = [(e, k) for e, k in chosen if e < len(self.down)]
        if not real:
            return torch.zeros_like(h)
        inner = self.activation(torch.cat([self._inner(h, e) for e, _ in real]))
        parts = torch.cat([self._outer(inner[i : i + 1], e) for i, (e, _) in enumerate(real)])
        scaled = (parts * weights[[k for _, k in real], None]).to(h.dtype)
        out = scaled[:1]
        for i in range(1, len(real)):
            out = out + scaled[i : i + 1]
        return out

    def _many(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Rows sorted by expert, each expert's in one product; a row's parts are then added up in
        the order of experts."""
        R, K = ids.shape
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
        scale = weights.reshape(-1)[order, None]
        x = h[order // K]
        if self.wiring.apply_router_weight_on_input:
            x, scale = (x * scale).to(h.dtype), torch.ones_like(scale)
        spans = list(zip(chosen.tolist(), torch.split(x, counts.tolist()), strict=True))
        real = [(e, part) for e, part in spans if 0 <= e < len(self.down)]
        if not real:
            return torch.zeros_like(h)
        both = self.activation(torch.cat([self._inner(part, e) for e, part in real]))
        inner = torch.split(both, [len(part) for _, part in real])
        downs = [self._outer(part, e) for (e, _), part in zip(real, inner, strict=True)]
        unused = sum(len(part) for e, part in spans if e < 0)
        null = len(x) - unused - sum(map(len, downs))
        parts = torch.cat([h.new_zeros(unused, h.shape[1]), *downs, h.new_zeros(null, h.shape[1])])
        parts = (parts * scale).to(h.dtype)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(R * K, device=h.device))
        places = places.view(R, K).sort(1).values
        out = parts[places[:, 0]]
        for k in range(1, K):
            out = out + parts[places[:, k]]
        return out


def _each(biases: Tensor | None, experts: int) -> tuple[Tensor | None, ...]:
    return (None,) * experts if biases is None else biases.unbind(0)
