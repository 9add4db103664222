"""Which tensors a `DecoderSpec` holds: names of our own, shapes, and the published parts of each.

A slot is one tensor as the interpreters want it; `parts` are what it is stacked from, row below row
(q, k and v become one matrix), by names of our own too. Those of mixers are in `mixer_slots`;
published names and layouts are in `families.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.mixer_slots import OF_MIXERS
from moescope.engine.operators import MLP, GateNetwork, MoE, Operator, Pass, RoutedAttention
from moescope.engine.slot import Shape, Slot, float32, of_linear, of_norm, plain

__all__ = ["Shape", "Slot", "count", "count_active", "read_per_token", "slots"]


def slots(spec: DecoderSpec) -> Iterator[Slot]:
    """Every tensor of the decoder, in the order the decoder uses them."""
    table = (spec.vocab_size, spec.hidden)
    yield plain("embed.weight", table, "vocab_size", "hidden_size")
    if spec.learned_embedding:
        yield plain("embed.shift", (spec.hidden,), "hidden_size")
        yield plain("embed.gain", (spec.hidden,), "hidden_size")
    for number, layer in enumerate(spec.layers):
        for branch in layer.branches:
            yield from _of_branch(f"layers.{number}.{branch.name}", branch, spec.hidden)
        if layer.learned_scale:
            yield plain(f"layers.{number}.scale", (1,), "one")
    yield from of_norm("final_norm", spec.final_norm)
    if not spec.tied_head:
        yield plain("head.weight", table, "vocab_size", "hidden_size")
    if spec.head_bias:
        yield plain("head.bias", (spec.vocab_size,), "vocab_size")


def count(spec: DecoderSpec) -> int:
    """Parameters in all."""
    return sum(slot.elements for slot in slots(spec))


def count_active(spec: DecoderSpec) -> int:
    """Parameters read for one token: K of E experts, and one row of an untied embedding."""
    return sum(elements for _, elements in read_per_token(spec))


def read_per_token(spec: DecoderSpec) -> Iterator[tuple[Slot, int]]:
    """Every tensor, and how many of its elements one token reads."""
    chosen = {
        f"layers.{number}.{branch.name}.": branch.operator.router
        for number, branch in spec.operators()
        if isinstance(branch.operator, MoE | RoutedAttention)
    }
    for slot in slots(spec):
        if slot.name == "embed.weight" and not spec.tied_head:
            yield slot, spec.hidden
        elif slot.per_expert:
            router = chosen[slot.name.partition("experts.")[0]]
            wanted = min(router.policy.num_experts_per_tok, router.wiring.num_experts)
            yield slot, slot.elements // router.wiring.num_experts * wanted
        else:
            yield slot, slot.elements


def _of_branch(path: str, branch: Branch, hidden: int) -> Iterator[Slot]:
    yield from of_norm(f"{path}.pre_norm", branch.pre_norm)
    for slot in _OF_OPERATORS[type(branch.operator)](branch.operator):
        parts = slot.parts
        if not slot.per_expert:
            parts = tuple((f"{path}.{name}", rows) for name, rows in parts)
        yield replace(slot, name=f"{path}.{slot.name}", parts=parts)
    yield from of_norm(f"{path}.post_norm", branch.post_norm)
    if branch.learned_sum:
        for name in ("shift", "gain", "kept_shift", "kept_gain"):
            yield plain(f"{path}.sum.{name}", (hidden,), "hidden_size")


def _of_mlp(m: MLP, prefix: str) -> Iterator[Slot]:
    width = "intermediate_size" if not prefix else "shared_expert_intermediate_size"
    names = ("gate_proj", "up_proj") if m.glu else ("up_proj",)
    rows = len(names) * m.width
    kinds = ("weight", "bias") if m.bias else ("weight",)
    for kind in kinds:
        parts = tuple((f"{prefix}{name}.{kind}", m.width) for name in names)
        shape = (rows, m.hidden) if kind == "weight" else (rows,)
        yield Slot(f"{prefix}gate_up.{kind}", shape, parts, (width, "hidden_size")[: len(shape)])
        down = (m.hidden, m.width) if kind == "weight" else (m.hidden,)
        yield plain(f"{prefix}down_proj.{kind}", down, *("hidden_size", width)[: len(down)])


def _of_moe(m: MoE) -> Iterator[Slot]:
    wiring, experts = m.router.wiring, m.experts
    classes = wiring.num_experts + wiring.num_null_experts
    network = m.gate_network
    if network is None:
        yield plain("gate.weight", (classes, m.hidden), "num_experts", "hidden_size")
    else:
        yield from _of_gate_network(network, m.hidden)
        yield plain("gate.weight", (classes, network.width), "num_experts", "router_hidden_size")
    if wiring.router_input == "residual_rms_scaled":
        yield plain("gate.scale", (m.hidden,), "hidden_size")
    if wiring.gate_bias:
        yield plain("gate.bias", (classes,), "num_experts")
    if m.router.policy.correction_bias != "none":
        yield float32("gate.correction_bias", classes, "num_experts")
    if m.router.policy.per_expert_scale:
        yield plain("gate.per_expert_scale", (classes,), "num_experts")
    hidden = experts.hidden or m.hidden
    if hidden != m.hidden:
        yield plain("latent_down.weight", (hidden, m.hidden), "moe_latent_size", "hidden_size")
        yield plain("latent_up.weight", (m.hidden, hidden), "hidden_size", "moe_latent_size")
    names = ("gate", "up") if experts.glu else ("up",)
    says = ("num_experts", "moe_intermediate_size", "hidden_size")
    yield Slot(
        "experts.gate_up",
        (wiring.num_experts, len(names) * experts.width, hidden),
        tuple((name, experts.width) for name in names),
        says,
        per_expert=True,
    )
    yield Slot(
        "experts.down",
        (wiring.num_experts, hidden, experts.width),
        (("down", hidden),),
        (says[0], says[2], says[1]),
        per_expert=True,
    )
    if experts.bias:
        yield Slot(
            "experts.gate_up_bias",
            (wiring.num_experts, len(names) * experts.width),
            tuple((f"{name}_bias", experts.width) for name in names),
            says[:2],
            per_expert=True,
        )
        yield Slot(
            "experts.down_bias",
            (wiring.num_experts, hidden),
            (("down_bias", hidden),),
            (says[0], says[2]),
            per_expert=True,
        )
    if m.shared is not None:
        yield from _of_mlp(m.shared, "shared_expert.")
        if wiring.shared_expert_gate == "sigmoid":
            yield plain("shared_expert_gate.weight", (1, m.hidden), "one", "hidden_size")
    if m.output_bias:
        yield plain("output_bias", (m.hidden,), "hidden_size")


def _of_gate_network(n: GateNetwork, hidden: int) -> Iterator[Slot]:
    says = "router_hidden_size"
    yield from of_linear("gate.down", n.width, hidden, True, says)
    if n.reads:
        yield plain("gate.carried", (n.width,), says)
    yield from of_norm("gate.norm", n.norm, says)
    for number in range(n.layers):
        yield plain(f"gate.layer_{number}.weight", (n.width, n.width), says, says)
        yield plain(f"gate.layer_{number}.bias", (n.width,), says)


_OF_OPERATORS: dict[type, Callable[[Any], Iterator[Slot]]] = {
    **OF_MIXERS,
    MLP: lambda m: _of_mlp(m, ""),
    MoE: _of_moe,
    Pass: lambda p: iter(()),
}
assert set(_OF_OPERATORS) == set(get_args(Operator))
