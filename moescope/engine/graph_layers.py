"""The layers of a fused step: which kernels run, in which order, for one token of each lane.

Branches run as `torch_decoder` runs them, in few launches. Everything that changes from step to
step is read from `graph_slots.Buffers`, so that a step can be captured once. What an operator
launches is `graph_operators`' affair. Letters: N lanes, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.decoder import RESIDUAL, Branch, DecoderSpec
from moescope.engine.graph_attention import FusedAttention, why_not_attention
from moescope.engine.graph_operators import (
    Carried,
    FusedMLP,
    FusedMoE,
    InTorch,
    RoutedInTorch,
)
from moescope.engine.graph_parts import After, Before, Branching, Operator, Running, Scratch
from moescope.engine.graph_slots import GATE, Buffers, picks
from moescope.engine.graph_static import FORMS, Static
from moescope.engine.operators import (
    MLP,
    Attention,
    MoE,
    Pass,
    RoutedAttention,
    rotary_embeddings,
)
from moescope.engine.steps import Policies, Shared
from moescope.engine.torch_operators import (
    DTYPES,
    Recurrent,
    TorchMLA,
    load_adds,
    load_embedding,
    switches,
)
from moescope.engine.torch_operators.attention import CachedAttention
from moescope.engine.torch_operators.common import Call
from moescope.kernels.triton_ops import (
    attention,
    gate_router,
    gemv,
    norms,
    sampling,
    tiles,
)

LANES = min(gemv.LANES, gate_router.T_MAX)
SHADOWS = gate_router.P_MAX - 1
LOOKING = (TorchMLA, CachedAttention)  # operators in torch over a cache
PROCESSORS = 4  # given work on a CPU, where kernels are interpreted


class Layers:
    """All layers of a decoder, from token ids to logits and what is drawn from them."""

    def __init__(self, shared: Shared, *, pdl: bool = False) -> None:
        self.shared, self.pdl, weights = shared, pdl, shared.weights
        self.spec, self.dtype = shared.spec, DTYPES[shared.dtype]
        self.start = load_embedding(self.spec, weights)
        self.embed, self.head_bias = weights["embed.weight"], weights.get("head.bias")
        assert shared.head is not None
        self.head = shared.head
        self.final = Before.load(self.spec.final_norm, weights, "final_norm", self.dtype)
        self.layers = _built(shared, self.dtype)
        self.scales = [
            weights[f"layers.{number}.scale"] if layer.learned_scale else None
            for number, layer in enumerate(self.spec.layers)
        ]
        every = [run for layer in self.layers for _, run, _, _ in layer]
        self.moes = [run for run in every if isinstance(run, FusedMoE)]
        self.gated = [run.gate for run in every if isinstance(run, FusedMoE | RoutedInTorch)]
        self.shapes = [run.shape for run in every if isinstance(run, FusedAttention)]
        self.in_torch = [run.run for run in every if isinstance(run, InTorch | RoutedInTorch)]
        self.ropes = {
            id(rope): rope
            for layer in self.layers
            for _, run, _, branch in layer
            if isinstance(run, InTorch | RoutedInTorch)
            for rope in rotary_embeddings(branch.operator)
        }.values()
        self.gates = {0: 0}  # bits a gate is rounded to -> which of a router's gates it is
        self._scratch: dict[int, Scratch] = {}

    def scratch(self, lanes: int) -> Scratch:
        if lanes not in self._scratch:
            device, vocabulary = self.shared.device, self.spec.vocab_size
            gates = [gate.copies.shape for gate in self.gated]
            attends = None
            if self.shapes:
                attends = attention.Scratch.of(self.shapes, lanes, device, processors(device))
            self._scratch[lanes] = Scratch(
                attends,
                sampling.Scratch.of(lanes, vocabulary, device),
                [gate_router.scratch(lanes, E, H, G, device) for G, E, H in gates],
            )
        return self._scratch[lanes]

    def hold_gates(self, policies: Policies) -> bool:
        """Have the gates that policies ask for; whether they had to be made, and moved."""
        missing = {int(bits) for bits in np.unique(policies.rows[..., GATE])} - set(self.gates)
        for bits in sorted(missing):
            self.gates[bits] = len(self.gates)
            for gate in self.gated:
                gate.hold(bits)
            self._scratch.clear()
        return bool(missing)

    def kernels(self) -> dict[str, str]:
        """Operator -> kernel and its configuration."""
        width = max((moe.down.shape[-1] for moe in self.moes), default=self.spec.hidden)
        found = {
            **tiles.configuration(self.spec.hidden, width, self.spec.vocab_size),
            "router": "triton, with its gate",
            "step": "graph: CUDA, programmatic launches" if self.pdl else "graph: CUDA",
        }
        if (attends := self.scratch(1).attention) is not None:
            keys = {attention.block(max(shape.head_dim, shape.values)) for shape in self.shapes}
            said = " and ".join(str(count) for count in sorted(keys))
            found["attention"] = f"triton: {attends.splits} splits, tiles of {said} keys"
        else:
            found["attention"] = "torch, in the graph"
        if names := sorted({type(run).__name__.removeprefix("Torch") for run in self.in_torch}):
            found["in torch"] = ", ".join(names)
        return found

    def recurrent(self) -> list[Recurrent]:
        """Operators whose state a step writes over."""
        return [run for run in self.in_torch if isinstance(run, Recurrent)]

    def reaches(self) -> bool:
        """Whether some operator looks at a number of positions that the graph is made for."""
        return any(isinstance(run, LOOKING) for run in self.in_torch)

    def run(self, buffers: Buffers, slot: Mapping[str, Tensor], drawing: str, reach: int) -> None:
        """One token of each lane: from the inputs of `buffers` into `slot` and the inputs of the
        token after it. No position is `reach` or more."""
        inputs = buffers.inputs.device
        static = self._static(inputs, reach)
        step = Running(buffers, slot, self.scratch(buffers.lanes), static, self.pdl)
        taps = {RESIDUAL: self._embedded(inputs["token_ids"])}
        for layer, scale in zip(self.layers, self.scales, strict=False):
            taps = self._layer(layer, scale, taps, step)
        logits, drawn = slot["logits"], slot["drawn"]
        self._logits(taps[RESIDUAL].to(self.dtype), logits)
        sampling.greedy(
            logits,
            step.scratch.sampling,
            drawn=drawn,
            token_ids=inputs["token_ids"],
            positions=inputs["positions"],
        )
        if drawing != "greedy":
            self._draw(buffers, logits, drawn, ranked=drawing == "ranked")

    def _embedded(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype).item()
        return self.start(x)

    def _layer(
        self,
        layer: list[Branching],
        scale: Tensor | None,
        taps: dict[str, Tensor],
        step: Running,
    ) -> dict[str, Tensor]:
        """The taps after a layer: the residual, and those that live on."""
        step.static.call.taps = taps
        for before, run, after, branch in layer:
            held = taps.get(branch.adds_to)
            read = taps[branch.reads].to(self.dtype)
            if held is not None and branch.keeps != 1.0 and after.adds is None:
                held = held * branch.keeps
            taps[branch.adds_to] = run(read, held, before, after, step)
        if scale is not None:
            taps[RESIDUAL] = taps[RESIDUAL] * scale
        return {n: tap for n, tap in taps.items() if n in (RESIDUAL, *self.spec.carried)}

    def _logits(self, x: Tensor, out: Tensor) -> None:
        """Scaled and capped, each rounded to the model's dtype; `out` is float32."""
        spec = self.spec
        h, riding = self.final.opened(x)
        options = {**riding, "multiplier": spec.logit_scale, "pdl": self.pdl}
        if not spec.logit_softcap:
            gemv.linear_small(h, self.head, self.head_bias, out=out, **options)
            return
        raw = gemv.linear_small(h, self.head, self.head_bias, **options)
        out.copy_(torch.tanh(raw / spec.logit_softcap) * spec.logit_softcap)

    def _static(self, inputs: Mapping[str, Tensor], reach: int) -> Static:
        """Rotations of every rope and all that operators in torch take from the device."""
        ids, positions = inputs["token_ids"], inputs["positions"].long()
        call = Call((), (), 1, ids, positions, [], (), False, [], [], {})
        for rope in self.ropes:
            cos, sin = self.shared.tables[id(rope)]
            at = positions
            if switches(rope):
                assert rope.scaling is not None
                at = at + (at >= rope.scaling.original_context) * self.shared.capacity
            call.rotations[id(rope)] = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
        return Static.of(inputs["lanes"], positions, reach, call)

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


def _built(shared: Shared, dtype: torch.dtype) -> list[list[Branching]]:
    """Every layer's branches with what runs them."""
    running, routers = iter(shared.operators), iter(enumerate(shared.routers))
    layers: list[list[Branching]] = []
    for number, layer in enumerate(shared.spec.layers):
        made = []
        for branch in layer.branches:
            path, weights = f"layers.{number}.{branch.name}", shared.weights
            run = _operator(branch, weights, path, dtype, next(running), routers)
            before = Before.load(branch.pre_norm, weights, f"{path}.pre_norm", dtype)
            post = Before.load(branch.post_norm, weights, f"{path}.post_norm", dtype)
            wide = branch.learned_sum or shared.spec.residual_dtype == "float32"
            adds = load_adds(branch, weights, path) if wide else None
            made.append((before, run, After(post, branch.multiplier, adds), branch))
        layers.append(made)
    return layers


def _operator(
    branch: Branch,
    weights: Mapping[str, Tensor],
    path: str,
    dtype: torch.dtype,
    running: Any,
    routers: Iterator[Any],
) -> Operator:
    match branch.operator:
        case Attention() as spec:
            return FusedAttention(spec, weights, path, dtype, running)
        case MLP() as spec if spec.width <= tiles.WIDEST:
            return FusedMLP(spec, weights, f"{path}.")
        case MLP():
            return InTorch(running, lambda run, h, static: run(h))
        case MoE() as spec:
            number, router = next(routers)
            return FusedMoE(spec, weights, path, running, router, number)
        case RoutedAttention() as spec:
            number, router = next(routers)
            return RoutedInTorch(spec, weights, path, running, router, number)
        case Pass():
            return Carried()
    form = next(form for kind, form in FORMS if isinstance(running, kind))
    return InTorch(running, form)


def processors(device: str) -> int:
    """Of a device, which a launch should give work to."""
    if device == "cpu":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def why_not(shared: Shared) -> str:
    """What a graph cannot hold, or ""."""
    for _, branch in shared.spec.operators():
        if isinstance(branch.operator, Attention) and (why := why_not_attention(branch.operator)):
            return why
    if max(_widths(shared.spec)) > tiles.WIDEST:
        return f"rows of more than {tiles.WIDEST} values: no fused form"
    if not shared.routers:
        return "no router: no fused form"
    refused = [gate_router.covers(1, router.spec.E, picks(shared)) for router in shared.routers]
    return next(filter(None, refused), "") or trial(shared.device)


def _widths(spec: DecoderSpec) -> Iterator[int]:
    """Of the rows that kernels multiply; dense blocks may be wider, and are torch's then."""
    yield spec.hidden
    for _, branch in spec.operators():
        match branch.operator:
            case Attention() as a:
                yield a.heads * (a.v_head_dim or a.head_dim)
            case MoE() as moe:
                yield max(moe.experts.width, moe.shared.width if moe.shared else 0)


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
