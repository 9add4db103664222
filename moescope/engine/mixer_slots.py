"""Which tensors the operators hold that mix tokens: attention of every kind, state spaces,
convolutions. Names and parts are our own, as `parameters` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from moescope.engine.operators import (
    MLA,
    Attention,
    ConvolvedAttention,
    Indexer,
    LinearAttention,
    RoutedAttention,
    ShortConv,
    StateSpace,
)
from moescope.engine.slot import HEADS, Shape, Slot, norm_weight, of_linear, of_norm, plain

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
        yield from of_norm("q_norm", a.qk_norm, HEADS)
        yield from of_norm("k_norm", a.kv_norm or a.qk_norm, HEADS)
    if a.sinks:
        yield plain("sinks", (a.heads,), "num_attention_heads")
    if a.gate in _GATE_ROWS:
        gates = a.heads * _GATE_ROWS[a.gate](a)
        yield plain("gate_proj.weight", (gates, a.hidden), "gate rows", "hidden_size")
        if a.gate_bias:
            yield plain("gate_bias", (a.heads,), "num_attention_heads")
    out = a.heads * (a.v_head_dim or a.head_dim)
    yield plain("o_proj.weight", (a.hidden, out), "hidden_size", "num_attention_heads × head_dim")
    if a.out_bias:
        yield plain("o_proj.bias", (a.hidden,), "hidden_size")


def _of_convolved_attention(a: ConvolvedAttention) -> Iterator[Slot]:
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    both, half = queries + keys, keys // 2
    rows = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys - half), ("v_before", half))
    wide = "num_attention_heads and num_key_value_heads × head_dim"
    shapes: dict[str, Shape] = {"weight": (both + keys, a.hidden), "bias": (both + keys,)}
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        parts = tuple((f"{name}.{kind}", count) for name, count in rows)
        yield Slot(f"qkv.{kind}", shapes[kind], parts, (wide, "hidden_size")[: len(shapes[kind])])
    yield plain("channel_conv.weight", (both, a.channel_kernel), wide, "channel kernel")
    yield plain("channel_conv.bias", (both,), wide)
    taps = (both, a.head_dim, a.head_kernel)
    yield plain("head_conv.weight", taps, wide, "head_dim", "head kernel")
    yield plain("head_conv.bias", (both,), wide)
    yield plain("key_scale", (a.kv_heads,), "num_key_value_heads")
    yield plain("o_proj.weight", (a.hidden, queries), "hidden_size", HEADS)
    if a.out_bias:
        yield plain("o_proj.bias", (a.hidden,), "hidden_size")


def _of_mla(m: MLA) -> Iterator[Slot]:
    wide = m.heads * (m.nope_dim + m.rope_dim + (m.v_dim if m.gate == "in_q_proj" else 0))
    if m.q_lora_rank:
        yield from of_linear("q_a_proj", m.q_lora_rank, m.hidden, m.bias, "q_lora_rank")
        yield from of_norm("q_a_norm", m.q_latent_norm, "q_lora_rank")
        seen = m.q_lora_rank * (2 if m.q_reads_raw else 1)
        yield plain("q_b_proj.weight", (wide, seen), "query rows", "q_lora_rank")
    else:
        yield plain("q_proj.weight", (wide, m.hidden), "query rows", "hidden_size")
    latent = m.kv_lora_rank + m.rope_dim
    yield from of_linear("kv_a_proj", latent, m.hidden, m.bias, "kv_lora_rank and rope")
    yield from of_norm("kv_a_norm", m.latent_norm, "kv_lora_rank")
    expanded = m.heads * (m.nope_dim + m.v_dim)
    yield plain("kv_b_proj.weight", (expanded, m.kv_lora_rank), "key rows", "kv_lora_rank")
    yield plain("o_proj.weight", (m.hidden, m.heads * m.v_dim), "hidden_size", "value columns")
    if m.bias:
        yield plain("o_proj.bias", (m.hidden,), "hidden_size")
    if m.gate == "sigmoid_per_head":
        yield plain("gate_proj.weight", (m.heads, m.hidden), "num_attention_heads", "hidden_size")
    if m.indexer is not None:
        yield from _of_indexer(m.indexer, m)


def _of_indexer(i: Indexer, m: MLA) -> Iterator[Slot]:
    wide = i.heads * i.head_dim
    yield plain("indexer.q_proj.weight", (wide, m.q_lora_rank), "index_n_heads", "q_lora_rank")
    yield plain("indexer.k_proj.weight", (i.head_dim, m.hidden), "index_head_dim", "hidden_size")
    yield from of_norm("indexer.k_norm", i.norm, "index_head_dim")
    weights = plain("indexer.weights.weight", (i.heads, m.hidden), "index_n_heads", "hidden_size")
    yield replace(weights, dtype="float32")


def _of_linear_attention(a: LinearAttention) -> Iterator[Slot]:
    keys, values = a.key_heads * a.key_dim, a.value_heads * a.value_dim
    yield from (_of_kda if a.kind == "kda" else _of_gated_delta)(a, keys, values)
    yield norm_weight("norm", a.out_norm)
    yield plain("out_proj.weight", (a.hidden, values), "hidden_size", "value columns")


def _of_kda(a: LinearAttention, keys: int, values: int) -> Iterator[Slot]:
    channels = 2 * keys + values
    rows = (("q_proj.weight", keys), ("k_proj.weight", keys), ("v_proj.weight", values))
    yield Slot("qkv.weight", (channels, a.hidden), rows, ("qkv rows", "hidden_size"))
    yield plain("conv.weight", (channels, a.conv_kernel), "qkv rows", "conv kernel")
    narrow = a.gate_rank or a.hidden
    for name, width in (("forget", keys), ("gate", values)):
        if a.gate_rank:
            yield plain(f"{name}_a.weight", (narrow, a.hidden), "gate rank", "hidden_size")
        yield plain(f"{name}_b.weight", (width, narrow), "qkv rows", "gate rank")
    yield plain("strength.weight", (a.value_heads, a.hidden), "value heads", "hidden_size")
    yield plain("A_log", (a.value_heads,), "value heads")
    yield plain("dt_bias", (keys,), "key rows")


def _of_gated_delta(a: LinearAttention, keys: int, values: int) -> Iterator[Slot]:
    channels = 2 * keys + values
    yield plain("in_proj_qkvz.weight", (channels + values, a.hidden), "qkvz rows", "hidden_size")
    yield plain("in_proj_ba.weight", (2 * a.value_heads, a.hidden), "value heads", "hidden_size")
    yield plain("conv.weight", (channels, a.conv_kernel), "qkv rows", "conv kernel")
    yield plain("A_log", (a.value_heads,), "value heads")
    yield plain("dt_bias", (a.value_heads,), "value heads")


def _of_state_space(m: StateSpace) -> Iterator[Slot]:
    first = m.kind == "mamba1"
    channels = m.inner if first else m.inner + 2 * m.groups * m.state_size
    rows = 2 * m.inner if first else m.inner + channels + m.heads
    yield plain("in_proj.weight", (rows, m.hidden), "inner rows", "hidden_size")
    yield plain("conv.weight", (channels, m.conv_kernel), "channels", "conv kernel")
    if m.conv_bias:
        yield plain("conv.bias", (channels,), "channels")
    yield from (_of_mamba1 if first else _of_mamba2)(m)
    yield plain("out_proj.weight", (m.hidden, m.inner), "hidden_size", "inner columns")
    if m.bias:
        yield plain("in_proj.bias", (rows,), "inner rows")
        yield plain("out_proj.bias", (m.hidden,), "hidden_size")


def _of_mamba1(m: StateSpace) -> Iterator[Slot]:
    selected = m.dt_rank + 2 * m.state_size
    yield plain("x_proj.weight", (selected, m.inner), "dt, B and C rows", "inner rows")
    yield plain("dt_proj.weight", (m.inner, m.dt_rank), "inner rows", "dt rank")
    yield plain("dt_proj.bias", (m.inner,), "inner rows")
    yield plain("A_log", (m.inner, m.state_size), "inner rows", "state size")
    yield plain("D", (m.inner,), "inner rows")
    for name, norm in m.select_norms():
        yield from of_norm(name, norm, "dt rank or state size")


def _of_mamba2(m: StateSpace) -> Iterator[Slot]:
    for name in ("A_log", "D", "dt_bias"):
        yield plain(name, (m.heads,), "heads")
    if m.gated_norm is not None:
        yield norm_weight("norm", m.gated_norm)


def _of_short_conv(c: ShortConv) -> Iterator[Slot]:
    yield plain("in_proj.weight", (3 * c.hidden, c.hidden), "rows", "hidden_size")
    yield plain("conv.weight", (c.hidden, c.kernel), "hidden_size", "conv kernel")
    yield plain("out_proj.weight", (c.hidden, c.hidden), "hidden_size", "hidden_size")
    if c.bias:
        for name, rows in (("in_proj", 3 * c.hidden), ("conv", c.hidden), ("out_proj", c.hidden)):
            yield plain(f"{name}.bias", (rows,), "rows")


def _of_routed_attention(a: RoutedAttention) -> Iterator[Slot]:
    experts, width = a.router.wiring.num_experts, a.kv_heads * a.head_dim
    yield plain("gate.weight", (experts, a.hidden), "num_experts", "hidden_size")
    yield plain("kv_proj.weight", (2 * width, a.hidden), "key rows", "hidden_size")
    says = ("num_experts", "query rows", "hidden_size")
    queries, out = (experts, width, a.hidden), (experts, a.hidden, width)
    yield Slot("experts.queries", queries, (("queries", width),), says, per_expert=True)
    yield Slot("experts.out", out, (("out", a.hidden),), (says[0], *says[:0:-1]), per_expert=True)
    if a.output_bias:
        yield plain("output_bias", (a.hidden,), "hidden_size")


OF_MIXERS: dict[type, Callable[[Any], Iterator[Slot]]] = {
    Attention: _of_attention,
    ConvolvedAttention: _of_convolved_attention,
    MLA: _of_mla,
    LinearAttention: _of_linear_attention,
    StateSpace: _of_state_space,
    ShortConv: _of_short_conv,
    RoutedAttention: _of_routed_attention,
}
