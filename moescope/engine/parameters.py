"""Which tensors a `DecoderSpec` holds: names of our own, shapes, and the published parts of each.

A slot is one tensor as the interpreters want it; `parts` are what it is stacked from, row below row
(q, k and v become one matrix), by names of our own too. Published names and layouts are in
`families.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    GateNetwork,
    Indexer,
    LinearAttention,
    MoE,
    Norm,
    Operator,
    Pass,
    RoutedAttention,
    ShortConv,
    StateSpace,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """`says` names each dimension in the words of a config, for messages about a misfit. Where
    `per_expert`, the first dimension counts experts and the parts are `gate`, `up`, `down` of each
    (`gate_bias`, `up_bias`, `down_bias` of the experts' biases). `dtype` is what it is held in.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, int], ...]  # (name, rows), in order
    says: tuple[str, ...]
    per_expert: bool = False
    dtype: Literal["model", "float32"] = "model"

    @property
    def elements(self) -> int:
        return prod(self.shape)


def slots(spec: DecoderSpec) -> Iterator[Slot]:
    """Every tensor of the decoder, in the order the decoder uses them."""
    table = (spec.vocab_size, spec.hidden)
    yield _plain("embed.weight", table, "vocab_size", "hidden_size")
    if spec.learned_embedding:
        yield _plain("embed.shift", (spec.hidden,), "hidden_size")
        yield _plain("embed.gain", (spec.hidden,), "hidden_size")
    for number, layer in enumerate(spec.layers):
        for branch in layer.branches:
            yield from _of_branch(f"layers.{number}.{branch.name}", branch, spec.hidden)
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
    yield from _of_norm(f"{path}.pre_norm", branch.pre_norm)
    for slot in _of_operator(branch.operator):
        parts = slot.parts
        if not slot.per_expert:
            parts = tuple((f"{path}.{name}", rows) for name, rows in parts)
        yield replace(slot, name=f"{path}.{slot.name}", parts=parts)
    yield from _of_norm(f"{path}.post_norm", branch.post_norm)
    if branch.learned_sum:
        for name in ("shift", "gain", "kept_shift", "kept_gain"):
            yield _plain(f"{path}.sum.{name}", (hidden,), "hidden_size")


_HEADS = "num_attention_heads × head_dim"


def _of_norm(path: str, norm: Norm | None, says: str = "hidden_size") -> Iterator[Slot]:
    if norm is not None and norm.weight:
        yield _plain(f"{path}.weight", (norm.width,), says)
    if norm is not None and norm.bias:
        yield _plain(f"{path}.bias", (norm.width,), says)
    if norm is not None and norm.gate_rank:
        yield _plain(f"{path}.gate_a.weight", (norm.gate_rank, norm.width), "gated_norm_rank", says)
        yield _plain(f"{path}.gate_b.weight", (norm.width, norm.gate_rank), says, "gated_norm_rank")


def _of_operator(operator: Operator) -> Iterator[Slot]:
    match operator:
        case Attention():
            yield from _of_attention(operator)
        case ConvolvedAttention():
            yield from _of_convolved_attention(operator)
        case MLP():
            yield from _of_mlp(operator, "")
        case MoE():
            yield from _of_moe(operator)
        case MLA():
            yield from _of_mla(operator)
        case LinearAttention():
            yield from _of_linear_attention(operator)
        case StateSpace():
            yield from _of_state_space(operator)
        case ShortConv():
            yield from _of_short_conv(operator)
        case RoutedAttention():
            yield from _of_routed_attention(operator)
        case Pass():
            pass


_GATE_ROWS: dict[str, Callable[[Attention], int]] = {
    "sigmoid": lambda a: a.head_dim,
    "softplus": lambda a: a.head_dim,
    "sigmoid_per_head": lambda a: 1,
    "softplus_per_head": lambda a: 1,
}


def _of_attention(a: Attention) -> Iterator[Slot]:
    keys = a.kv_heads * a.head_dim
    values = a.kv_heads * (a.v_head_dim or a.head_dim)
    queries = a.heads * a.head_dim * (2 if a.gate == "in_q_proj" else 1)
    values = 0 if a.keys_are_values else values
    rows = tuple(
        row for row in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)) if row[1]
    )
    wide = "num_attention_heads and num_key_value_heads × head_dim"
    for kind, wanted, shape in (
        ("weight", True, (queries + keys + values, a.hidden)),
        ("bias", a.qkv_bias, (queries + keys + values,)),
    ):
        if wanted:
            parts = tuple((f"{name}.{kind}", count) for name, count in rows)
            yield Slot(f"qkv.{kind}", shape, parts, (wide, "hidden_size")[: len(shape)])
    if a.qk_norm is not None:
        yield from _of_norm("q_norm", a.qk_norm, _HEADS)
        yield from _of_norm("k_norm", a.kv_norm or a.qk_norm, _HEADS)
    if a.sinks:
        yield _plain("sinks", (a.heads,), "num_attention_heads")
    if a.gate in _GATE_ROWS:
        gates = a.heads * _GATE_ROWS[a.gate](a)
        yield _plain("gate_proj.weight", (gates, a.hidden), "gate rows", "hidden_size")
        if a.gate_bias:
            yield _plain("gate_bias", (a.heads,), "num_attention_heads")
    out = a.heads * (a.v_head_dim or a.head_dim)
    yield _plain("o_proj.weight", (a.hidden, out), "hidden_size", "num_attention_heads × head_dim")
    if a.out_bias:
        yield _plain("o_proj.bias", (a.hidden,), "hidden_size")


def _of_convolved_attention(a: ConvolvedAttention) -> Iterator[Slot]:
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    both, half = queries + keys, keys // 2
    rows = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys - half), ("v_before", half))
    wide = "num_attention_heads and num_key_value_heads × head_dim"
    shapes: dict[str, Shape] = {"weight": (both + keys, a.hidden), "bias": (both + keys,)}
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        parts = tuple((f"{name}.{kind}", count) for name, count in rows)
        yield Slot(f"qkv.{kind}", shapes[kind], parts, (wide, "hidden_size")[: len(shapes[kind])])
    yield _plain("channel_conv.weight", (both, a.channel_kernel), wide, "channel kernel")
    yield _plain("channel_conv.bias", (both,), wide)
    taps = (both, a.head_dim, a.head_kernel)
    yield _plain("head_conv.weight", taps, wide, "head_dim", "head kernel")
    yield _plain("head_conv.bias", (both,), wide)
    yield _plain("key_scale", (a.kv_heads,), "num_key_value_heads")
    yield _plain("o_proj.weight", (a.hidden, queries), "hidden_size", _HEADS)
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
    network = m.gate_network
    if network is None:
        yield _plain("gate.weight", (classes, m.hidden), "num_experts", "hidden_size")
    else:
        yield from _of_gate_network(network, m.hidden)
        yield _plain("gate.weight", (classes, network.width), "num_experts", "router_hidden_size")
    if wiring.router_input == "residual_rms_scaled":
        yield _plain("gate.scale", (m.hidden,), "hidden_size")
    if wiring.gate_bias:
        yield _plain("gate.bias", (classes,), "num_experts")
    if m.router.policy.correction_bias != "none":
        yield _float32("gate.correction_bias", classes, "num_experts")
    if m.router.policy.per_expert_scale:
        yield _plain("gate.per_expert_scale", (classes,), "num_experts")
    hidden = experts.hidden or m.hidden
    if hidden != m.hidden:
        yield _plain("latent_down.weight", (hidden, m.hidden), "moe_latent_size", "hidden_size")
        yield _plain("latent_up.weight", (m.hidden, hidden), "hidden_size", "moe_latent_size")
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
            yield _plain("shared_expert_gate.weight", (1, m.hidden), "one", "hidden_size")
    if m.output_bias:
        yield _plain("output_bias", (m.hidden,), "hidden_size")


def _of_gate_network(n: GateNetwork, hidden: int) -> Iterator[Slot]:
    says = "router_hidden_size"
    yield from _of_linear("gate.down", n.width, hidden, True, says)
    if n.reads:
        yield _plain("gate.carried", (n.width,), says)
    yield from _of_norm("gate.norm", n.norm, says)
    for number in range(n.layers):
        yield _plain(f"gate.layer_{number}.weight", (n.width, n.width), says, says)
        yield _plain(f"gate.layer_{number}.bias", (n.width,), says)


def _of_mla(m: MLA) -> Iterator[Slot]:
    wide = m.heads * (m.nope_dim + m.rope_dim + (m.v_dim if m.gate == "in_q_proj" else 0))
    if m.q_lora_rank:
        yield from _of_linear("q_a_proj", m.q_lora_rank, m.hidden, m.bias, "q_lora_rank")
        yield from _of_norm("q_a_norm", m.q_latent_norm, "q_lora_rank")
        seen = m.q_lora_rank * (2 if m.q_reads_raw else 1)
        yield _plain("q_b_proj.weight", (wide, seen), "query rows", "q_lora_rank")
    else:
        yield _plain("q_proj.weight", (wide, m.hidden), "query rows", "hidden_size")
    latent = m.kv_lora_rank + m.rope_dim
    yield from _of_linear("kv_a_proj", latent, m.hidden, m.bias, "kv_lora_rank and rope")
    yield from _of_norm("kv_a_norm", m.latent_norm, "kv_lora_rank")
    expanded = m.heads * (m.nope_dim + m.v_dim)
    yield _plain("kv_b_proj.weight", (expanded, m.kv_lora_rank), "key rows", "kv_lora_rank")
    yield _plain("o_proj.weight", (m.hidden, m.heads * m.v_dim), "hidden_size", "value columns")
    if m.bias:
        yield _plain("o_proj.bias", (m.hidden,), "hidden_size")
    if m.gate == "sigmoid_per_head":
        yield _plain("gate_proj.weight", (m.heads, m.hidden), "num_attention_heads", "hidden_size")
    if m.indexer is not None:
        yield from _of_indexer(m.indexer, m)


def _of_indexer(i: Indexer, m: MLA) -> Iterator[Slot]:
    wide = i.heads * i.head_dim
    yield _plain("indexer.q_proj.weight", (wide, m.q_lora_rank), "index_n_heads", "q_lora_rank")
    yield _plain("indexer.k_proj.weight", (i.head_dim, m.hidden), "index_head_dim", "hidden_size")
    yield from _of_norm("indexer.k_norm", i.norm, "index_head_dim")
    weights = _plain("indexer.weights.weight", (i.heads, m.hidden), "index_n_heads", "hidden_size")
    yield replace(weights, dtype="float32")


def _of_linear_attention(a: LinearAttention) -> Iterator[Slot]:
    keys, values = a.key_heads * a.key_dim, a.value_heads * a.value_dim
    yield from (_of_kda if a.kind == "kda" else _of_gated_delta)(a, keys, values)
    yield _norm_weight("norm", a.out_norm)
    yield _plain("out_proj.weight", (a.hidden, values), "hidden_size", "value columns")


def _of_kda(a: LinearAttention, keys: int, values: int) -> Iterator[Slot]:
    channels = 2 * keys + values
    rows = (("q_proj.weight", keys), ("k_proj.weight", keys), ("v_proj.weight", values))
    yield Slot("qkv.weight", (channels, a.hidden), rows, ("qkv rows", "hidden_size"))
    yield _plain("conv.weight", (channels, a.conv_kernel), "qkv rows", "conv kernel")
    narrow = a.gate_rank or a.hidden
    for name, width in (("forget", keys), ("gate", values)):
        if a.gate_rank:
            yield _plain(f"{name}_a.weight", (narrow, a.hidden), "gate rank", "hidden_size")
        yield _plain(f"{name}_b.weight", (width, narrow), "qkv rows", "gate rank")
    yield _plain("strength.weight", (a.value_heads, a.hidden), "value heads", "hidden_size")
    yield _plain("A_log", (a.value_heads,), "value heads")
    yield _plain("dt_bias", (keys,), "key rows")


def _of_gated_delta(a: LinearAttention, keys: int, values: int) -> Iterator[Slot]:
    channels = 2 * keys + values
    yield _plain("in_proj_qkvz.weight", (channels + values, a.hidden), "qkvz rows", "hidden_size")
    yield _plain("in_proj_ba.weight", (2 * a.value_heads, a.hidden), "value heads", "hidden_size")
    yield _plain("conv.weight", (channels, a.conv_kernel), "qkv rows", "conv kernel")
    yield _plain("A_log", (a.value_heads,), "value heads")
    yield _plain("dt_bias", (a.value_heads,), "value heads")


def _of_state_space(m: StateSpace) -> Iterator[Slot]:
    first = m.kind == "mamba1"
    channels = m.inner if first else m.inner + 2 * m.groups * m.state_size
    rows = 2 * m.inner if first else m.inner + channels + m.heads
    yield _plain("in_proj.weight", (rows, m.hidden), "inner rows", "hidden_size")
    yield _plain("conv.weight", (channels, m.conv_kernel), "channels", "conv kernel")
    if m.conv_bias:
        yield _plain("conv.bias", (channels,), "channels")
    yield from (_of_mamba1 if first else _of_mamba2)(m)
    yield _plain("out_proj.weight", (m.hidden, m.inner), "hidden_size", "inner columns")
    if m.bias:
        yield _plain("in_proj.bias", (rows,), "inner rows")
        yield _plain("out_proj.bias", (m.hidden,), "hidden_size")


def _of_mamba1(m: StateSpace) -> Iterator[Slot]:
    selected = m.dt_rank + 2 * m.state_size
    yield _plain("x_proj.weight", (selected, m.inner), "dt, B and C rows", "inner rows")
    yield _plain("dt_proj.weight", (m.inner, m.dt_rank), "inner rows", "dt rank")
    yield _plain("dt_proj.bias", (m.inner,), "inner rows")
    yield _plain("A_log", (m.inner, m.state_size), "inner rows", "state size")
    yield _plain("D", (m.inner,), "inner rows")
    for name, norm in m.select_norms():
        yield from _of_norm(name, norm, "dt rank or state size")


def _of_mamba2(m: StateSpace) -> Iterator[Slot]:
    for name in ("A_log", "D", "dt_bias"):
        yield _plain(name, (m.heads,), "heads")
    if m.gated_norm is not None:
        yield _norm_weight("norm", m.gated_norm)


def _of_short_conv(c: ShortConv) -> Iterator[Slot]:
    yield _plain("in_proj.weight", (3 * c.hidden, c.hidden), "rows", "hidden_size")
    yield _plain("conv.weight", (c.hidden, c.kernel), "hidden_size", "conv kernel")
    yield _plain("out_proj.weight", (c.hidden, c.hidden), "hidden_size", "hidden_size")
    if c.bias:
        for name, rows in (("in_proj", 3 * c.hidden), ("conv", c.hidden), ("out_proj", c.hidden)):
            yield _plain(f"{name}.bias", (rows,), "rows")


def _of_routed_attention(a: RoutedAttention) -> Iterator[Slot]:
    experts, width = a.router.wiring.num_experts, a.kv_heads * a.head_dim
    yield _plain("gate.weight", (experts, a.hidden), "num_experts", "hidden_size")
    yield _plain("kv_proj.weight", (2 * width, a.hidden), "key rows", "hidden_size")
    says = ("num_experts", "query rows", "hidden_size")
    queries, out = (experts, width, a.hidden), (experts, a.hidden, width)
    yield Slot("experts.queries", queries, (("queries", width),), says, per_expert=True)
    yield Slot("experts.out", out, (("out", a.hidden),), (says[0], *says[:0:-1]), per_expert=True)
    if a.output_bias:
        yield _plain("output_bias", (a.hidden,), "hidden_size")


def _of_linear(name: str, rows: int, columns: int, bias: bool, says: str) -> Iterator[Slot]:
    yield _plain(f"{name}.weight", (rows, columns), says, "hidden_size")
    if bias:
        yield _plain(f"{name}.bias", (rows,), says)


def _plain(name: str, shape: Shape, *says: str) -> Slot:
    return Slot(name, shape, ((name, shape[0]),), says)


def _float32(name: str, size: int, says: str) -> Slot:
    return Slot(name, (size,), ((name, size),), (says,), dtype="float32")


def _norm_weight(name: str, norm: Norm) -> Slot:
    return _plain(f"{name}.weight", (norm.width,), "num_attention_heads × head_dim")
