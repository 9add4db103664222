"""A router, its experts, and what stands beside them. What experts compute is `experts.py`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moescope.engine.operators import MoE, RoutedAttention
from moescope.engine.torch_operators.common import DTYPES, Call, Groups, Stateless, Weights, linear
from moescope.engine.torch_operators.experts import TorchExperts
from moescope.engine.torch_operators.gate_network import TorchGateNetwork
from moescope.engine.torch_operators.mlp import TorchMLP
from moescope.engine.torch_operators.norms import make_norm
from moescope.kernels.spec import RouterSpec, Routing
from moescope.kernels.torch_ops import route_torch


class TorchRouter:
    """The gate's product and the routing of every row under the spec of its lane. Where a network
    stands before the gate, what the gate reads is its output."""

    def __init__(
        self, spec: MoE | RoutedAttention, weights: Weights, path: str, index: int
    ) -> None:
        self.spec, self.index = spec, index
        self.gate = weights[f"{path}.gate.weight"]
        self.gate_bias = weights.get(f"{path}.gate.bias")
        self.rounded_gates: dict[int, Tensor] = {}
        self.correction_bias = weights.get(f"{path}.gate.correction_bias")
        self.per_expert_scale = weights.get(f"{path}.gate.per_expert_scale")
        self.seen = _INPUTS[spec.router.wiring.router_input](spec, weights, path)
        network = spec.gate_network if isinstance(spec, MoE) else None
        self.network = None if network is None else TorchGateNetwork(network, weights, path)
        self.alter: Callable[[Tensor], Tensor] | None = None  # the logits, as a fault would

    def __call__(self, h: Tensor, call: Call) -> Routing:
        """h [R, H] after the branch's norm -> routing of R rows; the call keeps it."""
        x = self.seen(h, call.read)
        if self.network is not None:
            x = self.network(x, call)
        groups = call.groups[self.index]
        routing = (
            self.route(x, groups[0][0], call)
            if len(groups) == 1
            else self._route_groups(x, groups, call)
        )
        if call.intervene is not None:
            routing = call.intervene(self, x, routing, call)
        call.routings.append(routing)
        if call.shadows:
            variants = [self.route(x, specs[self.index], call) for specs in call.shadows]
            call.shadow_routings.append(variants)
        return routing

    def route(self, x: Tensor, spec: RouterSpec, call: Call) -> Routing:
        """What this router decides under `spec` for rows that its gate reads as `x` [R, H]."""
        dtype = DTYPES[spec.wiring.router_dtype]
        gate = self._gate(spec.policy.gate_quant_bits).to(dtype)
        bias = None if self.gate_bias is None else self.gate_bias.to(dtype)
        policy = spec.policy
        logits = linear(x.to(dtype), gate, bias)
        return route_torch(
            logits if self.alter is None else self.alter(logits),
            spec,
            correction_bias=self.correction_bias if policy.correction_bias != "none" else None,
            per_expert_scale=self.per_expert_scale if policy.per_expert_scale else None,
            keep_logits=call.keep_logits,
        )

    def _gate(self, bits: int) -> Tensor:
        """The gate's weight, or a copy rounded to `bits`."""
        if bits == 0:
            return self.gate
        if bits not in self.rounded_gates:
            self.rounded_gates[bits] = rounded_gate(self.gate, bits)
        return self.rounded_gates[bits]

    def _route_groups(self, x: Tensor, groups: Groups, call: Call) -> Routing:
        """Lanes under different policies: one routing per policy, put together again by rows."""
        R, E = len(x), groups[0][0].E
        K = max(spec.K for spec, _ in groups)
        whole = _empty_routing(R, K, E, x.device, call.keep_logits)
        for spec, rows in groups:
            assert rows is not None
            part = self.route(x[rows], spec, call)
            for name in ("expert_ids", "scores", "weights"):
                getattr(whole, name)[rows, : spec.K] = getattr(part, name)
            for name in ("score_sum", "mass", "entropy", "margin", "runner_up"):
                getattr(whole, name)[rows] = getattr(part, name)
            if call.keep_logits:
                whole.logits[rows] = part.logits
        return whole


class TorchMoE(Stateless):
    """Routed experts and a shared expert beside them."""

    def __init__(self, spec: MoE, weights: Weights, path: str, index: int) -> None:
        self.spec, wiring = spec, spec.router.wiring
        self.router = TorchRouter(spec, weights, path, index)
        self.experts = TorchExperts(spec, weights, f"{path}.experts")
        self.latent = tuple(weights.get(f"{path}.latent_{way}.weight") for way in ("down", "up"))
        self.output_bias = weights.get(f"{path}.output_bias")
        self.null = wiring.null_expert_kind == "identity"
        self.shared: TorchMLP | None = None
        self.shared_gate = weights.get(f"{path}.shared_expert_gate.weight")
        if spec.shared is not None:
            self.shared = TorchMLP(spec.shared, weights, f"{path}.shared_expert.")

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        routing = self.router(h, call)
        out = self._routed(h, routing)
        for spec, rows in call.groups[self.router.index]:
            if spec.output_scale != 1.0:
                out[slice(None) if rows is None else rows] *= spec.output_scale
        if self.output_bias is not None:
            out = out + self.output_bias
        return out if self.shared is None else self._with_shared(out, h)

    def _routed(self, h: Tensor, routing: Routing) -> Tensor:
        down, up = self.latent
        x = h if down is None else linear(h, down)
        out = self.experts(x, routing.expert_ids, routing.weights)
        if self.null:
            null = routing.expert_ids >= self.spec.router.wiring.num_experts
            share = torch.where(null, routing.weights, 0.0).sum(-1, keepdim=True)
            out = out + (share * h).to(h.dtype)
        return out if up is None else linear(out, up)

    def _with_shared(self, out: Tensor, h: Tensor) -> Tensor:
        assert self.shared is not None
        extra = self.shared(h)
        if self.shared_gate is not None:
            extra = torch.sigmoid(linear(h, self.shared_gate)) * extra
        wiring = self.spec.router.wiring
        if wiring.combine_dtype == "float32" and self.spec.sums_in_float32:
            return (out.float() + extra.float()).to(h.dtype)
        out = out + extra
        return out / 2 if wiring.shared_combination == "average" else out


def rounded_gate(gate: Tensor, bits: int) -> Tensor:
    """A gate's weight [E, H] rounded to `bits`, symmetric about 0 in each row."""
    wide = gate.double()
    step = wide.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, torch.round(wide / step) * step, 0.0).to(gate.dtype)


# --- what a router sees: (h after the branch's norm, what the branch read) -> x ---------------

Seen = Callable[[Tensor, Tensor], Tensor]


def _normed(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    return lambda h, read: h


def _residual(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    return lambda h, read: read


def _residual_rms_scaled(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    """A norm without weight, a learned scale, and 1 / sqrt(H) (Gemma 4)."""
    assert isinstance(spec, MoE) and spec.router_norm is not None
    norm, scale = make_norm(spec.router_norm), weights[f"{path}.gate.scale"]
    root = spec.hidden**-0.5
    return lambda h, read: norm(read) * scale * root


_INPUTS: dict[str, Callable[[MoE | RoutedAttention, Weights, str], Seen]] = {
    "normed": _normed,
    "residual": _residual,
    "residual_rms_scaled": _residual_rms_scaled,
    "carried_mlp": _normed,
}


def _empty_routing(R: int, K: int, E: int, device: torch.device, logits: bool) -> Routing:
    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device)

    nan = float("nan")
    return Routing(
        expert_ids=torch.full((R, K), -1, dtype=torch.int32, device=device),
        scores=full(0.0, R, K),
        weights=full(0.0, R, K),
        score_sum=full(nan, R),
        mass=full(nan, R),
        entropy=full(nan, R),
        margin=full(nan, R),
        runner_up=torch.full((R,), -1, dtype=torch.int32, device=device),
        logits=full(nan, R, E) if logits else None,
    )
