"""A router, its experts, and what stands beside them. What experts compute is `experts.py`'s."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from moescope.engine.mlx_operators.common import DTYPES, Call, Stateless, Weights
from moescope.engine.mlx_operators.experts import MLXExperts
from moescope.engine.mlx_operators.gate_network import MLXGateNetwork
from moescope.engine.mlx_operators.matrix import Dense, Matrix, array, matrix
from moescope.engine.mlx_operators.mlp import MLXMLP
from moescope.engine.mlx_operators.norms import make_norm
from moescope.engine.operators import MoE, RoutedAttention
from moescope.kernels.mlx_ops import route_mlx
from moescope.kernels.policy_rows import COLUMN, pack
from moescope.kernels.spec import RouterSpec, Routing


class MLXRouter:
    """The gate's product, and the routing of every row under the policies of its lane. Where a
    network stands before the gate, what the gate reads is its output."""

    def __init__(
        self, spec: MoE | RoutedAttention, weights: Weights, path: str, index: int
    ) -> None:
        self.spec, self.index = spec, index
        wiring, policy = spec.router.wiring, spec.router.policy
        self.dtype = DTYPES[wiring.router_dtype]
        self.gates: dict[int, Matrix] = {0: matrix(weights[f"{path}.gate.weight"])}
        self.bias = self._vector(weights, f"{path}.gate.bias", wiring.gate_bias)
        self.correction_bias = self._vector(
            weights, f"{path}.gate.correction_bias", policy.correction_bias != "none"
        )
        self.per_expert_scale = self._vector(
            weights, f"{path}.gate.per_expert_scale", policy.per_expert_scale
        )
        self.seen = _INPUTS[wiring.router_input](spec, weights, path)
        network = spec.gate_network if isinstance(spec, MoE) else None
        self.network = None if network is None else MLXGateNetwork(network, weights, path)

    @staticmethod
    def _vector(weights: Weights, name: str, wanted: bool) -> mx.array | None:
        return array(weights[name]) if wanted else None

    def __call__(self, h: mx.array, call: Call) -> tuple[mx.array, mx.array]:
        """h [R, H] after the branch's norm -> ids [R, K], weights [R, K]; the call keeps the whole
        routing."""
        static = call.static
        rows = call.rows[self.index]  # [R, P, WIDTH]
        assert call.read is not None
        x = self.seen(h, call.read)
        if self.network is not None:
            x = self.network(x, call)
        routing = self._routed(x.astype(self.dtype), rows, call)
        if call.intervene is not None:
            routing = call.intervene(self, x, routing, call)
        call.routings.append(routing)
        K = static.picks[self.index]
        return routing.expert_ids[:, 0, :K], routing.weights[:, 0, :K]

    def route(self, x: mx.array, spec: RouterSpec, call: Call) -> Routing:
        """What this router decides under `spec` for rows its gate reads as `x` [R, H]: arrays
        [R, ...], with the logits."""
        bits = spec.policy.gate_quant_bits
        return route_mlx(
            self._gate(bits)(x.astype(self.dtype), self.bias),
            mx.array(pack(spec, gate=bits)[None].astype(np.float32)),
            spec.K,
            correction_bias=self.correction_bias,
            per_expert_scale=self.per_expert_scale,
            keep_logits=True,
        )

    def scaled(self, out: mx.array, call: Call) -> mx.array:
        """What is routed [R, H], times the factor that the policy in force has for it."""
        if not call.static.scales_output:
            return out
        scale = call.rows[self.index, :, 0, COLUMN["output_scale"], None]
        return (out.astype(mx.float32) * scale).astype(out.dtype)

    def _routed(self, x: mx.array, rows: mx.array, call: Call) -> Routing:
        """Routing of R rows under P policies each: arrays [R, P, ...]; logits are [R, E], as the
        policy in force has them."""
        (R, P, width), static = rows.shape, call.static
        made = {bits: self._gate(bits)(x, self.bias) for bits in static.gate_bits}  # [R, E] each
        logits = made[static.gate_bits[0]]

        def route(logits: mx.array, rows: mx.array) -> Routing:
            found = partial(
                route_mlx,
                logits,
                rows,
                static.recorded[self.index],
                correction_bias=self.correction_bias,
                per_expert_scale=self.per_expert_scale,
                keep_logits=static.keep_logits,
                fields=static.fields,
            )
            if not static.slow_router:
                return found()
            call.beside.append(found())
            return found(use_metal=False)

        if len(made) == 1:
            return route(logits, rows)
        for bits in static.gate_bits[1:]:
            wanted = rows[..., COLUMN["gate"], None] == bits
            logits = mx.where(wanted, made[bits][:, None], _spread(logits, P))
        flat = route(logits.reshape(R * P, -1), rows.reshape(R * P, width))
        arrays = {f: getattr(flat, f) for f in Routing.__slots__}
        apart = {f: None if a is None else a.reshape(R, P, *a.shape[1:]) for f, a in arrays.items()}
        if apart["logits"] is not None:
            apart["logits"] = apart["logits"][:, 0]
        return Routing(**apart)

    def _gate(self, bits: int) -> Matrix:
        """The gate in the dtype of its product, as stored (0) or rounded to `bits`."""
        found = self.gates.get(bits)
        if found is None:
            found = self.gates[bits] = Dense(rounded_gate(self.gates[0].whole(), bits))
        if isinstance(found, Dense) and found.weight.dtype != self.dtype:
            found = self.gates[bits] = Dense(found.weight.astype(self.dtype))
        return found


def _spread(logits: mx.array, P: int) -> mx.array:
    """[R, E], or what is so already, as [R, P, E]."""
    return logits if logits.ndim == 3 else mx.repeat(logits[:, None], P, axis=1)


class MLXMoE(Stateless):
    """Routed experts and a shared expert beside them."""

    def __init__(self, spec: MoE, weights: Weights, path: str, index: int) -> None:
        self.spec, wiring = spec, spec.router.wiring
        self.router = MLXRouter(spec, weights, path, index)
        self.experts = MLXExperts(spec, weights, f"{path}.experts")
        self.null = wiring.null_expert_kind == "identity"
        self.latent = [
            matrix(weights[name])
            for way in ("down", "up")
            if (name := f"{path}.latent_{way}.weight") in weights
        ]
        self.output_bias = array(weights[f"{path}.output_bias"]) if spec.output_bias else None
        self.shared: MLXMLP | None = None
        self.shared_gate: Matrix | None = None
        if spec.shared is not None:
            self.shared = MLXMLP(spec.shared, weights, f"{path}.shared_expert.")
        if wiring.shared_expert_gate == "sigmoid":
            self.shared_gate = matrix(weights[f"{path}.shared_expert_gate.weight"])

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        out = self.router.scaled(self._routed(h, *self.router(h, call)), call)
        if self.output_bias is not None:
            out = out + self.output_bias
        return out if self.shared is None else self._with_shared(out, h)

    def _routed(self, h: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        x = self.latent[0](h) if self.latent else h
        out = self.experts(x, ids, weights)
        if self.null:
            null = ids >= self.spec.router.wiring.num_experts
            share = mx.where(null, weights, 0.0).sum(-1, keepdims=True)
            out = out + (share * h).astype(h.dtype)
        return self.latent[1](out) if self.latent else out

    def _with_shared(self, out: mx.array, h: mx.array) -> mx.array:
        assert self.shared is not None
        extra = self.shared(h)
        if self.shared_gate is not None:
            extra = mx.sigmoid(self.shared_gate(h)) * extra
        wiring = self.spec.router.wiring
        if wiring.combine_dtype == "float32" and self.spec.sums_in_float32:
            return (out.astype(mx.float32) + extra.astype(mx.float32)).astype(h.dtype)
        out = out + extra
        return out / 2 if wiring.shared_combination == "average" else out


def rounded_gate(gate: mx.array, bits: int) -> mx.array:
    """A gate's weight [E, H] rounded to `bits`, symmetric about 0 in each row."""
    wide = gate.astype(mx.float32)
    step = mx.max(mx.abs(wide), 1, keepdims=True) / (2 ** (bits - 1) - 1)
    rounded = mx.round(wide / mx.where(step > 0, step, 1.0)) * step
    return mx.where(step > 0, rounded, 0.0).astype(gate.dtype)


# --- what a router sees: (h after the branch's norm, what the branch read) -> x -------------------

Seen = Callable[[mx.array, mx.array], mx.array]


def _normed(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    return lambda h, read: h


def _residual(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    return lambda h, read: read


def _residual_rms_scaled(spec: MoE | RoutedAttention, weights: Weights, path: str) -> Seen:
    """A norm without weight, a learned scale, and 1 / sqrt(H) (Gemma 4)."""
    assert isinstance(spec, MoE) and spec.router_norm is not None
    norm, scale = make_norm(spec.router_norm), array(weights[f"{path}.gate.scale"])
    root = spec.hidden**-0.5
    return lambda h, read: norm(read) * scale * root


_INPUTS: dict[str, Callable[[MoE | RoutedAttention, Weights, str], Seen]] = {
    "normed": _normed,
    "residual": _residual,
    "residual_rms_scaled": _residual_rms_scaled,
    "carried_mlp": _normed,
}
