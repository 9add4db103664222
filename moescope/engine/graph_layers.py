"""The layers of a fused step: which kernels run, in which order, for one token of each lane.

Branches run as `torch_decoder` runs them, in few launches: a norm before an operator rides in its
first product, multiplier and sum in its last. Everything that changes from step to step is read
from `graph_slots.Buffers`, so that a step can be captured once. Letters: N lanes, H hidden,
D head width, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.decoder import RESIDUAL, Branch
from moescope.engine.graph_slots import GATE, Buffers, picks
from moescope.engine.interpreter import Router
from moescope.engine.operators import MLP, Attention, MoE, Norm
from moescope.engine.steps import Policies, Shared
from moescope.engine.torch_operators import DTYPES, rounded_gate
from moescope.kernels.spec import Routing
from moescope.kernels.triton_ops import (
    attention,
    experts,
    gate_router,
    gemv,
    norms,
    sampling,
    tiles,
)

LANES = min(gemv.LANES, gate_router.T_MAX)
SHADOWS = gate_router.P_MAX - 1
PROCESSORS = 4  # given work on a CPU, where kernels are interpreted
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory of kernels for N lanes. Made before a capture and kept: its counters start at 0."""

    attention: attention.Scratch
    sampling: sampling.Scratch
    gates: list[gate_router.Scratch]  # of each router


@dataclass(frozen=True, slots=True)
class Pass:
    """What the operators of one step share: inputs, where routing goes, and scratch memory."""

    buffers: Buffers
    slot: Mapping[str, Tensor]
    scratch: Scratch
    pdl: bool


@dataclass(frozen=True, slots=True)
class Before:
    """The norm before an operator, if there is one."""

    norm: Norm | None
    weight: Tensor | None

    def riding(self) -> dict[str, Any]:
        """Arguments of a product that norms its input."""
        if self.norm is None:
            return {}
        return {"norm": self.weight, "eps": self.norm.eps, "applies": self.norm.applies}


@dataclass(frozen=True, slots=True)
class After:
    """What happens to an operator's output: norm, multiplier, sum with what the tap holds."""

    norm: Norm | None
    weight: Tensor | None
    multiplier: float

    def riding(self, held: Tensor | None) -> dict[str, Any]:
        """Arguments of a last product that does what it can of this."""
        if self.norm is not None:
            return {}
        return {"multiplier": self.multiplier, "residual": held, "out": held}

    def rest(self, y: Tensor, held: Tensor | None) -> Tensor:
        """What then remains."""
        if self.norm is None or self.weight is None:
            return y
        into = y if held is None else held
        norms.rms_norm(
            y, self.weight, self.norm.eps, self.norm.applies,
            multiplier=self.multiplier, held=held, out=into,
        )  # fmt: skip
        return into


class Operator(Protocol):
    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Pass
    ) -> Tensor:
        """The tap after the branch: `read` [N, H] is what the branch reads, `held` what the tap
        holds, which may be written over."""


class FusedAttention:
    """Three launches: q, k and v; attention with everything around it; the output."""

    def __init__(self, spec: Attention, weights: Weights, path: str, number: int) -> None:
        self.number, self.shape = number, attention_shape(spec)
        self.qkv, self.qkv_bias = weights[f"{path}.qkv.weight"], weights.get(f"{path}.qkv.bias")
        self.out = weights[f"{path}.o_proj.weight"]
        self.out_bias = weights.get(f"{path}.o_proj.bias")
        self.norms: tuple[Tensor, Tensor] | None = None
        if spec.qk_norm is not None:
            self.norms = weights[f"{path}.q_norm.weight"], weights[f"{path}.k_norm.weight"]

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Pass
    ) -> Tensor:
        shared, inputs = step.buffers.shared, step.buffers.inputs.device
        qkv = gemv.linear_small(read, self.qkv, self.qkv_bias, **before.riding(), pdl=step.pdl)
        mixed = attention.attend(
            qkv,
            shared.caches[self.number],
            inputs["lanes"],
            inputs["positions"],
            self.shape,
            step.scratch.attention,
            weights=self.norms,
            rotation=shared.rotations.get(self.number),
            out=qkv.new_empty(len(qkv), self.shape.heads * self.shape.head_dim),
            pdl=step.pdl,
        )
        y = gemv.linear_small(mixed, self.out, self.out_bias, **after.riding(held), pdl=step.pdl)
        return after.rest(y, held)


class FusedMLP:
    """A gated dense block in two launches."""

    def __init__(self, spec: MLP, weights: Weights, path: str) -> None:
        self.activation = spec.activation
        self.gate_up = weights[f"{path}gate_up.weight"]
        self.down = weights[f"{path}down_proj.weight"]

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Pass
    ) -> Tensor:
        y = self.block(read, **before.riding(), **after.riding(held), pdl=step.pdl)
        return after.rest(y, held)

    def block(self, read: Tensor, **options: Any) -> Tensor:
        options["activation"] = self.activation
        out: Tensor = experts.mlp_small(read, self.gate_up, self.down, **options)
        return out


class FusedMoE:
    """Gate and router, gate-up, down with the sum of the experts; and a shared expert."""

    def __init__(
        self, spec: MoE, weights: Weights, path: str, spec_of: Router, number: int
    ) -> None:
        self.number, self.router, self.wiring = number, spec_of.spec, spec_of.spec.wiring
        self.gate = weights[f"{path}.gate.weight"]
        self.dtype = DTYPES[self.wiring.router_dtype]
        self.gates = self.gate[None]  # [G, E, H], as stored and rounded
        self.gate_up = weights[f"{path}.experts.gate_up"]
        self.down = weights[f"{path}.experts.down"]
        self.shared: FusedMLP | None = None
        self.shared_gate = weights.get(f"{path}.shared_expert_gate.weight")
        if spec.shared is not None:
            self.shared = FusedMLP(spec.shared, weights, f"{path}.shared_expert.")
        self.options = {
            "activation": spec.experts.activation,
            "weight_on_input": self.wiring.apply_router_weight_on_input,
            "combine_dtype": DTYPES[self.wiring.combine_dtype],
        }

    def __call__(
        self, read: Tensor, held: Tensor | None, before: Before, after: After, step: Pass
    ) -> Tensor:
        routing = step.buffers.routing(step.slot, self.number)
        self._route(read, before, step, routing)
        y = experts.experts_small(
            read,
            self.gate_up,
            self.down,
            routing.expert_ids[:, 0],
            routing.weights[:, 0],
            **self.options,
            **before.riding(),
            output_scale=step.buffers.output_scales[self.number],
            shared=self._shared(read, before, step),
            **after.riding(held),
            pdl=step.pdl,
        )
        return after.rest(y, held)

    def hold_gate(self, bits: int) -> None:
        self.gates = torch.cat((self.gates, rounded_gate(self.gate, bits)[None]))

    def _route(self, read: Tensor, before: Before, step: Pass, into: Routing) -> None:
        seen = Before(None, None) if self.wiring.router_input == "residual" else before
        gate_router.gate_and_route(
            read,
            self.gates,
            step.buffers.rows,
            step.buffers.row_of[self.number],
            step.buffers.K,
            step.scratch.gates[self.number],
            self.dtype,
            out=into,
            **seen.riding(),
        )

    def _shared(self, read: Tensor, before: Before, step: Pass) -> Tensor | None:
        if self.shared is None:
            return None
        opened: dict[str, Any] = {}
        if self.shared_gate is not None:
            gate = gemv.linear_small(read, self.shared_gate, **before.riding(), pdl=step.pdl)
            opened = {"output_scale": torch.sigmoid(gate).float().view(-1)}
        return self.shared.block(read, **before.riding(), **opened, pdl=step.pdl)


def attention_shape(spec: Attention) -> attention.Shape:
    norm, over = spec.qk_norm, spec.qk_norm_over
    q_eps, k_eps = (norm.eps, (spec.kv_norm or norm).eps) if norm else (0.0, 0.0)
    return attention.Shape(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        window=spec.window,
        clip=spec.clip_qkv,
        norm="none" if norm is None else over,
        norm_wide=norm is not None and over == "flat" and norm.applies == "float32",
        q_eps=q_eps,
        k_eps=k_eps if over == "flat" else q_eps,
    )


class Layers:
    """All layers of a decoder, from token ids to logits and what is drawn from them."""

    def __init__(self, shared: Shared, *, pdl: bool = False) -> None:
        self.shared, self.pdl, weights = shared, pdl, shared.weights
        self.embed = weights["embed.weight"]
        self.head = weights["embed.weight" if shared.spec.tied_head else "head.weight"]
        final = shared.spec.final_norm
        self.final = Before(final, weights.get("final_norm.weight"))
        self.layers = [list(_branches(shared, number)) for number in range(len(shared.spec.layers))]
        every = [run for layer in self.layers for _, run, _, _ in layer]
        self.moes = [run for run in every if isinstance(run, FusedMoE)]
        self.shapes = [run.shape for run in every if isinstance(run, FusedAttention)]
        self.gates = {0: 0}  # bits a gate is rounded to -> which of a router's gates it is
        self._scratch: dict[int, Scratch] = {}

    def scratch(self, lanes: int) -> Scratch:
        if lanes not in self._scratch:
            device, vocabulary = self.shared.device, self.shared.spec.vocab_size
            gates = [moe.gates.shape for moe in self.moes]
            self._scratch[lanes] = Scratch(
                attention.Scratch.of(self.shapes, lanes, device, processors(device)),
                sampling.Scratch.of(lanes, vocabulary, device),
                [gate_router.scratch(lanes, E, H, G, device) for G, E, H in gates],
            )
        return self._scratch[lanes]

    def hold_gates(self, policies: Policies) -> bool:
        """Have the gates that policies ask for; whether they had to be made, and moved."""
        missing = {int(bits) for bits in np.unique(policies.rows[..., GATE])} - set(self.gates)
        for bits in sorted(missing):
            self.gates[bits] = len(self.gates)
            for moe in self.moes:
                moe.hold_gate(bits)
            self._scratch.clear()
        return bool(missing)

    def kernels(self) -> dict[str, str]:
        """Operator -> kernel and its configuration."""
        spec = self.shared.spec
        width = max((moe.down.shape[-1] for moe in self.moes), default=spec.hidden)
        splits = self.scratch(1).attention.splits
        return {
            **tiles.configuration(spec.hidden, width, spec.vocab_size),
            "attention": f"triton: {splits} splits, tiles of {attention.BLOCK} keys",
            "router": "triton, with its gate",
            "step": "graph: CUDA, programmatic launches" if self.pdl else "graph: CUDA",
        }

    def run(self, buffers: Buffers, slot: Mapping[str, Tensor], drawing: str) -> None:
        """One token of each lane: from the inputs of `buffers` into `slot` and the inputs of the
        token after it."""
        step = Pass(buffers, slot, self.scratch(buffers.lanes), self.pdl)
        inputs = buffers.inputs.device
        x = F.embedding(inputs["token_ids"], self.embed)
        for layer in self.layers:
            taps = {RESIDUAL: x}
            for before, run, after, branch in layer:
                held = taps.get(branch.adds_to)
                taps[branch.adds_to] = run(taps[branch.reads], held, before, after, step)
            x = taps[RESIDUAL]
        logits, drawn = slot["logits"], slot["drawn"]
        gemv.linear_small(x, self.head, out=logits, **self.final.riding(), pdl=self.pdl)
        sampling.greedy(
            logits,
            step.scratch.sampling,
            drawn=drawn,
            token_ids=inputs["token_ids"],
            positions=inputs["positions"],
        )
        if drawing != "greedy":
            self._draw(buffers, logits, drawn, ranked=drawing == "ranked")

    def _draw(self, buffers: Buffers, logits: Tensor, drawn: Tensor, *, ranked: bool) -> None:
        """Over the greedy tokens, in lanes that are not greedy."""
        asked = buffers.sampling.device
        heat = asked["temperature"]
        drawn_at_random = sampling.draw(
            logits,
            torch.where(heat > 0, heat, 1.0),
            asked["top_k"],
            asked["top_p"],
            asked["min_p"],
            asked["uniform"],
            ranked=ranked,
        )
        drawn.copy_(torch.where(heat[:, 0] > 0, drawn_at_random, drawn))
        buffers.inputs.device["token_ids"].copy_(drawn)


def _branches(shared: Shared, number: int) -> Iterator[tuple[Before, Operator, After, Branch]]:
    weights = shared.weights
    for branch in shared.spec.layers[number].branches:
        path = f"layers.{number}.{branch.name}"
        run: Operator
        match branch.operator:
            case Attention() as spec:
                run = FusedAttention(spec, weights, path, _count(shared, Attention, path))
            case MLP() as spec:
                run = FusedMLP(spec, weights, f"{path}.")
            case MoE() as spec:
                place = _count(shared, MoE, path)
                run = FusedMoE(spec, weights, path, shared.routers[place], place)
            case other:
                raise AssertionError(f"{type(other).__name__} should have been refused")
        before = Before(branch.pre_norm, weights.get(f"{path}.pre_norm.weight"))
        after = After(branch.post_norm, weights.get(f"{path}.post_norm.weight"), branch.multiplier)
        yield before, run, after, branch


def _count(shared: Shared, kind: type, path: str) -> int:
    """How many operators of `kind` run before the one at `path`."""
    paths = [
        f"layers.{number}.{branch.name}"
        for number, branch in shared.spec.operators()
        if isinstance(branch.operator, kind)
    ]
    return paths.index(path)


def processors(device: str) -> int:
    """Of a device, which a launch should give work to."""
    if device == "cpu":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def why_not(shared: Shared) -> str:
    """What there is no fused form of, or ""."""
    for _, branch in shared.spec.operators():
        operator = branch.operator
        if not isinstance(operator, Attention | MLP | MoE):
            return f"{type(operator).__name__}: no fused form"
    if not any(isinstance(branch.operator, Attention) for _, branch in shared.spec.operators()):
        return "no attention: no fused form"
    if any(tensor.shape[-1] > tiles.WIDEST for tensor in shared.weights.values()):
        return f"rows of more than {tiles.WIDEST} values: no fused form"
    if not shared.routers:
        return "no router: no fused form"
    refused = [gate_router.covers(1, router.spec.E, picks(shared)) for router in shared.routers]
    return next(filter(None, refused), "") or trial(shared.device)


def trial(device: str) -> str:
    """Why Triton does not run on a device, or "": it needs a C compiler, Python's headers, and a
    device it knows, and says so only when the first kernel is launched."""
    if device == "cpu":
        return ""
    x = torch.ones(1, 16, device=device)
    try:
        with torch.cuda.device(device):
            norms.rms_norm(x, x[0], 1e-6, "model", out=torch.empty_like(x))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"Triton: {first or type(error).__name__}"
    return ""
