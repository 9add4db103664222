"""Operators of a fused step: dense blocks and routed experts in Triton kernels, and those without a
fused form in torch (`graph_static`). Attention is `graph_attention`'s. Letters: N lanes, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moescope.engine.graph_parts import After, Before, Running, Weights
from moescope.engine.graph_static import Static, routed_attention
from moescope.engine.interpreter import Router
from moescope.engine.operators import MLP, Experts, MoE, RoutedAttention
from moescope.engine.torch_operators import DTYPES, TorchMoE, rounded_gate
from moescope.engine.torch_operators.gate_network import TorchGateNetwork
from moescope.engine.torch_operators.routed_attention import TorchRoutedAttention
from moescope.kernels.spec import Routing
from moescope.kernels.triton_ops import experts, gate_router, gemv
from moescope.kernels.triton_ops.gating import Gating


class FusedMLP:
    """A dense block in two launches."""

    def __init__(self, spec: MLP, weights: Weights, path: str) -> None:
        self.gate_up = weights[f"{path}gate_up.weight"]
        self.down = weights[f"{path}down_proj.weight"]
        self.options: dict[str, Any] = {
            "gating": gating(spec),
            "gate_up_bias": weights.get(f"{path}gate_up.bias"),
            "down_bias": weights.get(f"{path}down_proj.bias"),
        }

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        h, riding = before.opened(read)
        return after.rest(self.block(h, **riding, **after.riding(held), pdl=step.pdl), held)

    def block(self, h: Tensor, **options: Any) -> Tensor:
        out: Tensor = experts.mlp_small(h, self.gate_up, self.down, **self.options, **options)
        return out


def gating(spec: MLP | Experts) -> Gating:
    after = spec.limit_site == "after"
    return Gating(spec.activation, spec.glu, spec.limit, after, spec.alpha, spec.up_shift)


class FusedMoE:
    """Gate and router, gate-up, down with the sum of the experts; and a shared expert."""

    def __init__(
        self, spec: MoE, weights: Weights, path: str, run: TorchMoE, router: Router, number: int
    ) -> None:
        self.number, self.wiring = number, router.spec.wiring
        wiring = self.wiring
        self.gate = FusedGate(spec, weights, path, router, run.router.network)
        self.gate_up = weights[f"{path}.experts.gate_up"]
        self.down = weights[f"{path}.experts.down"]
        self.latent = tuple(weights.get(f"{path}.latent_{way}.weight") for way in ("down", "up"))
        self.output_bias = weights.get(f"{path}.output_bias")
        self.shared: FusedMLP | None = None
        self.shared_gate = weights.get(f"{path}.shared_expert_gate.weight")
        if spec.shared is not None:
            self.shared = FusedMLP(spec.shared, weights, f"{path}.shared_expert.")
        self.options = {
            "gating": gating(spec.experts),
            "gate_up_bias": weights.get(f"{path}.experts.gate_up_bias"),
            "down_bias": weights.get(f"{path}.experts.down_bias"),
            "weight_on_input": wiring.apply_router_weight_on_input,
            "combine_dtype": DTYPES[wiring.combine_dtype],
        }
        self.average = wiring.shared_combination == "average"

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        routing = step.buffers.routing(step.slot, self.number)
        again = self.wiring.null_expert_kind == "identity" or self.gate.network is not None
        if again:  # what reads the normed state beside a product
            before = Before(whole=before.whole)
        h, riding = before.opened(read)
        self.gate(read, h, riding, self.number, step, routing)
        shared = self._shared(h, riding, step)
        if self.latent[0] is not None:
            return after.every(self._through_latent(h, riding, routing, shared, step), held)
        y = experts.experts_small(
            h,
            self.gate_up,
            self.down,
            routing.expert_ids[:, 0],
            routing.weights[:, 0],
            **self.options,
            **riding,
            passed=h if self.wiring.null_expert_kind == "identity" else None,
            output_scale=step.buffers.output_scales[self.number],
            output_bias=self.output_bias,
            shared=shared,
            average=self.average,
            **after.riding(held),
            pdl=step.pdl,
        )
        return after.rest(y, held)

    def _through_latent(
        self,
        h: Tensor,
        riding: dict[str, Any],
        routing: Routing,
        shared: Tensor | None,
        step: Running,
    ) -> Tensor:
        """Experts of another width, between two products; what follows the sum in torch."""
        down, up = self.latent
        assert down is not None and up is not None
        x = gemv.linear_small(h, down, **riding, pdl=step.pdl)
        ids, weights = routing.expert_ids[:, 0], routing.weights[:, 0]
        x = experts.experts_small(
            x, self.gate_up, self.down, ids, weights, **self.options, pdl=step.pdl
        )
        y: Tensor = gemv.linear_small(x, up, pdl=step.pdl)
        y = (y * step.buffers.output_scales[self.number][:, None]).to(y.dtype)
        y = y if self.output_bias is None else y + self.output_bias
        y = y if shared is None else y + shared
        return y / 2 if self.average else y

    def _shared(self, h: Tensor, riding: dict[str, Any], step: Running) -> Tensor | None:
        if self.shared is None:
            return None
        opened: dict[str, Any] = {}
        if self.shared_gate is not None:
            gate = gemv.linear_small(h, self.shared_gate, **riding, pdl=step.pdl)
            opened = {"output_scale": torch.sigmoid(gate).float().view(-1)}
        return self.shared.block(h, **riding, **opened, pdl=step.pdl)


class FusedGate:
    """A gate with its router, in one launch; a network before it is torch's. `copies` [G, E, H]:
    as stored, and rounded."""

    def __init__(
        self,
        spec: MoE | RoutedAttention,
        weights: Weights,
        path: str,
        router: Router,
        network: TorchGateNetwork | None = None,
    ) -> None:
        self.network = network
        wiring = router.spec.wiring
        self.source, self.dtype = wiring.router_input, DTYPES[wiring.router_dtype]
        self.weight = weights[f"{path}.gate.weight"]
        self.copies = self.weight[None]
        self.vectors = {
            "gate_bias": weights.get(f"{path}.gate.bias"),
            "bias": weights.get(f"{path}.gate.correction_bias"),
            "per_expert_scale": weights.get(f"{path}.gate.per_expert_scale"),
        }
        self.own: dict[str, Any] = {}
        if self.source == "residual_rms_scaled":
            assert isinstance(spec, MoE) and spec.router_norm is not None
            scale = weights[f"{path}.gate.scale"]
            own = {"norm": scale, "eps": spec.router_norm.eps, "applies": "model"}
            self.own = own | {"scale": spec.hidden**-0.5}

    def hold(self, bits: int) -> None:
        self.copies = torch.cat((self.copies, rounded_gate(self.weight, bits)[None]))

    def __call__(
        self,
        read: Tensor,
        h: Tensor,
        riding: dict[str, Any],
        number: int,
        step: Running,
        into: Routing,
    ) -> None:
        """Route what this gate sees of a branch: what that read, or h with the norm that rides."""
        x, norm = (h, riding) if self.source in ("normed", "carried_mlp") else (read, self.own)
        if self.network is not None:
            x, norm = self.network(x, step.static.call), {}
        gate_router.gate_and_route(
            x,
            self.copies,
            step.buffers.rows,
            step.buffers.row_of[number],
            step.buffers.K,
            step.scratch.gates[number],
            self.dtype,
            **self.vectors,
            out=into,
            **norm,
        )


class InTorch:
    """An operator without a fused form; what stands around it in its branch is torch's too."""

    def __init__(self, run: Any, form: Callable[[Any, Tensor, Static], Tensor]) -> None:
        self.run, self.form = run, form

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        return after.every(self.form(self.run, before.applied(read), step.static), held)


class RoutedInTorch:
    """Attention whose projections are experts: its gate and router fused, the rest in torch."""

    def __init__(
        self,
        spec: RoutedAttention,
        weights: Weights,
        path: str,
        run: TorchRoutedAttention,
        router: Router,
        number: int,
    ) -> None:
        self.run, self.number = run, number
        self.gate = FusedGate(spec, weights, path, router)
        self.experts = weights[f"{path}.experts.queries"], weights[f"{path}.experts.out"]

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        routing, h = step.buffers.routing(step.slot, self.number), before.applied(read)
        self.gate(read, h, {}, self.number, step, routing)
        picked = routing.expert_ids[:, 0], routing.weights[:, 0]
        y = routed_attention(self.run, *self.experts, h, *picked, step.static)
        return after.every(y, held)


class Carried:
    """The identity, into memory of its own."""

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Running
    ) -> Tensor:
        y = before.applied(read)
        return after.every(y.clone() if y is read else y, held)
