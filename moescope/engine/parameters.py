"""Which tensors a `DecoderSpec` holds: names of our own, shapes, and the published parts of each.

A slot is one tensor as the interpreters want it; `parts` are what it is stacked from, row below row
(q, k and v become one matrix), by names of our own too. Published names and layouts are in
`families.names`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from moescope.engine.decoder import MLP, Attention, Branch, DecoderSpec, MoE, Norm, Operator

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """`says` names each dimension in the words of a config, for messages about a misfit. Where
    `per_expert`, the first dimension counts experts and the parts are `gate`, `up`, `down` of each.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, int], ...]  # (name, rows), in order
    says: tuple[str, ...]
    per_expert: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)


def slots(spec: DecoderSpec) -> Iterator[Slot]:
    """Every tensor of the decoder, in the order the decoder uses them."""
    table = (spec.vocab_size, spec.hidden)
    yield _plain("embed.weight", table, "vocab_size", "hidden_size")
    for number, layer in enumerate(spec.layers):
        for branch in layer.branches:
            yield from _of_branch(f"layers.{number}.{branch.name}", branch)
        if layer.learned_scale:
            yield _plain(f"layers.{number}.scale", (1,), "one")
    yield from _of_norm("final_norm", spec.final_norm)
    if not spec.tied_head:
        yield _plain("head.weight", table, "vocab_size", "hidden_size")
    if spec.head_bias:
        yield _plain("head.bias", (spec.vocab_size,), "vocab_size")


def count(spec: DecoderSpec) -> int:
    """Parameters in all."""
    return sum(slot.elements for slot in slots(spec))


def count_active(spec: DecoderSpec) -> int:
    """Parameters read for one token: K of E experts, and one row of an untied embedding."""
    chosen = {
        f"layers.{number}.{branch.name}.": branch.operator.router
        for number, branch in spec.operators()
        if isinstance(branch.operator, MoE)
    }
    total = 0
    for slot in slots(spec):
        if slot.name == "embed.weight" and not spec.tied_head:
            total += spec.hidden
        elif slot.per_expert:
            router = chosen[slot.name.partition("experts.")[0]]
            wanted = min(router.policy.num_experts_per_tok, router.wiring.num_experts)
            total += slot.elements // router.wiring.num_experts * wanted
        else:
            total += slot.elements
    return total


def _of_branch(path: str, branch: Branch) -> Iterator[Slot]:
    yield from _of_norm(f"{path}.pre_norm", branch.pre_norm)
    for slot in _of_operator(branch.operator):
        parts = slot.parts
        if not slot.per_expert:
            parts = tuple((f"{path}.{name}", rows) for name, rows in parts)
        yield Slot(f"{path}.{slot.name}", slot.shape, parts, slot.says, slot.per_expert)
    yield from _of_norm(f"{path}.post_norm", branch.post_norm)


def _of_norm(path: str, norm: Norm | None) -> Iterator[Slot]:
    if norm is not None and norm.weight:
        yield _plain(f"{path}.weight", (norm.width,), "hidden_size")
    if norm is not None and norm.bias:
        yield _plain(f"{path}.bias", (norm.width,), "hidden_size")


def _of_operator(operator: Operator) -> Iterator[Slot]:
    match operator:
        case Attention():
            yield from _of_attention(operator)
        case MLP():
            yield from _of_mlp(operator, "")
        case MoE():
            yield from _of_moe(operator)
        case _:
            raise NotImplementedError(type(operator).__name__)


def _of_attention(a: Attention) -> Iterator[Slot]:
    keys = a.kv_heads * a.head_dim
    values = a.kv_heads * (a.v_head_dim or a.head_dim)
    queries = a.heads * a.head_dim
    rows = (("q_proj", queries), ("k_proj", keys), ("v_proj", values))
    wide = "num_attention_heads and num_key_value_heads × head_dim"
    for kind, wanted, shape in (
        ("weight", True, (queries + keys + values, a.hidden)),
        ("bias", a.qkv_bias, (queries + keys + values,)),
    ):
        if wanted:
            parts = tuple((f"{name}.{kind}", count) for name, count in rows)
            yield Slot(f"qkv.{kind}", shape, parts, (wide, "hidden_size")[: len(shape)])
    if a.qk_norm is not None:
        yield _norm_weight("q_norm", a.qk_norm)
        yield _norm_weight("k_norm", a.kv_norm or a.qk_norm)
    out = a.heads * (a.v_head_dim or a.head_dim)
    yield _plain("o_proj.weight", (a.hidden, out), "hidden_size", "num_attention_heads × head_dim")
    if a.out_bias:
        yield _plain("o_proj.bias", (a.hidden,), "hidden_size")


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
        yield _plain(f"{prefix}down_proj.{kind}", down, *("hidden_size", width)[: len(down)])


def _of_moe(m: MoE) -> Iterator[Slot]:
    wiring, experts = m.router.wiring, m.experts
    classes = wiring.num_experts + wiring.num_null_experts
    yield _plain("gate.weight", (classes, m.hidden), "num_experts", "hidden_size")
    if wiring.gate_bias:
        yield _plain("gate.bias", (classes,), "num_experts")
    if m.router.policy.correction_bias != "none":
        yield _plain("gate.correction_bias", (classes,), "num_experts")
    if m.router.policy.per_expert_scale:
        yield _plain("gate.per_expert_scale", (classes,), "num_experts")
    hidden = experts.hidden or m.hidden
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
    if m.shared is not None:
        yield from _of_mlp(m.shared, "shared_expert.")
        if wiring.shared_expert_gate == "sigmoid":
            yield _plain("shared_expert_gate.weight", (1, m.hidden), "one", "hidden_size")
    if m.output_bias:
        yield _plain("output_bias", (m.hidden,), "hidden_size")


def _plain(name: str, shape: Shape, *says: str) -> Slot:
    return Slot(name, shape, ((name, shape[0]),), says)


def _norm_weight(name: str, norm: Norm) -> Slot:
    return _plain(f"{name}.weight", (norm.width,), "num_attention_heads × head_dim")
