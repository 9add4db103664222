"""Attentions as operators of a C program: what they project, place, cache, read and give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moescope.engine.operators import MLA, Attention
from moescope.kernels import native_ops as native

if TYPE_CHECKING:
    from moescope.engine.native_program import Place, Program


def attention(program: Program, a: Attention, place: Place) -> None:
    """Queries, keys and values stand in one row, in this order."""
    D, V, path = a.head_dim, a.v_head_dim or a.head_dim, place.path
    q, k, v = a.heads * D, a.kv_heads * D, a.kv_heads * V
    qkv, mixed = program.buffer("qkv", q + k + v), program.buffer("mixed", a.heads * V)
    gate, gates = _project(program, a, place, qkv)
    _ready_values(program, a, qkv, q + k, v)
    _ready_queries(program, a, path, qkv)
    running: Any = program.shared.operators[place.number]
    cache = {
        **{"kv_heads": a.kv_heads, "key_step": D, "value_step": V},
        "keys": running.keys.data_ptr(),
        "values": running.values.data_ptr(),
    }
    program.add("store", x=qkv, at=q, **cache)
    sizes = {"heads": a.heads, "head_dim": D, "v_dim": V, "window": a.window, "chunk": a.chunk}
    each = _heads_of_a_chunk(a.heads, a.kv_heads, program.threads)
    plain = a.sinks or a.softcap > 0  # what the torch operator does in products of its own
    sizes["flags"] = native.SHARES * plain | native.ROUNDED * (plain and not a.float32_scores)
    sizes["sinks"] = program.wide(f"{path}.sinks") if a.sinks else 0
    program.add("attend", x=qkv, groups=each, number=a.scale, cap=a.softcap, **sizes, **cache)
    program.add("merge", y=mixed, **sizes, **cache)
    if a.gate != "none":
        flags = native.SOFTPLUS * a.gate.startswith("softplus")
        bias = program.wide(f"{path}.gate_bias")
        says = {"groups": gates, "bias": bias, "heads": a.heads if bias else 0}
        program.add("gated", x=gate, y=mixed, cols=a.heads * V, flags=flags, **says)
    program.linear(f"{path}.o_proj", mixed, place.y, a.hidden, a.heads * V)


def _project(program: Program, a: Attention, place: Place, qkv: int) -> tuple[int, int]:
    """Fills the row; the buffer of what gates the output, and how many numbers that are."""
    D, name = a.head_dim, f"{place.path}.qkv"
    q, k = a.heads * D, a.kv_heads * D
    v = 0 if a.keys_are_values else a.kv_heads * (a.v_head_dim or D)
    if a.gate == "in_q_proj":
        raw, gate = program.buffer("raw", 2 * q + k + v), program.buffer("opening", q)
        program.linear(name, place.h, raw, 2 * q + k + v, a.hidden)
        apart = {"groups": a.heads, "step": 2 * D, "to_step": D}
        program.copy(raw, qkv, D, **apart)
        program.copy(raw, gate, D, at=D, **apart)
        program.copy(raw, qkv, k + v, at=2 * q, to=q)
        gates = q
    else:
        program.linear(name, place.h, qkv, q + k + v, a.hidden)
        gates = a.heads if a.gate.endswith("per_head") else q
        gate = program.buffer("opening", gates)
        if a.gate != "none":
            program.linear(f"{place.path}.gate_proj", place.h, gate, gates, a.hidden)
    if a.keys_are_values:
        program.copy(qkv, qkv, k, at=q, to=q + k)
    return gate, gates


def _ready_values(program: Program, a: Attention, qkv: int, at: int, cols: int) -> None:
    if a.clip_qkv is not None:
        program.add("clip", x=qkv, at=at, cols=cols, number=a.clip_qkv)
    if a.v_norm is not None:
        program.norm(a.v_norm, "", qkv, qkv, at=at, groups=a.kv_heads)
    program.scale(qkv, cols, a.value_scale, at=at)


def _ready_queries(program: Program, a: Attention, path: str, qkv: int) -> None:
    D = a.head_dim
    if not a.qk_norm_after_rope:
        _norm_queries(program, a, path, qkv)
    if a.clip_qkv is not None:
        program.add("clip", x=qkv, cols=(a.heads + a.kv_heads) * D, number=a.clip_qkv)
    program.turn(a.rope, qkv, a.heads + a.kv_heads, D)
    if a.qk_norm_after_rope:
        _norm_queries(program, a, path, qkv)
    if a.temperature_scale:
        flags = native.WIDE | native.POWER * (a.temperature_kind == "power")
        numbers = {"number": a.temperature_scale, "floor": a.temperature_floor}
        program.add("warm", x=qkv, cols=a.heads * D, flags=flags, **numbers)


def _norm_queries(program: Program, a: Attention, path: str, qkv: int) -> None:
    if a.qk_norm is None:
        return
    k_norm = a.kv_norm or a.qk_norm
    each = a.qk_norm_over == "per_head"
    says: dict[str, Any] = {}
    rounds_first = a.qk_norm.kind == "rms" and a.qk_norm.applies == "model"
    if each and rounds_first and a.qk_norm.weight and k_norm.weight:
        says = {
            "eps": a.qk_norm.eps,
            "wide": False,
        }  # as in torch, with one call for both
    for norm, name, at, heads in (
        (a.qk_norm, "q_norm", 0, a.heads),
        (k_norm, "k_norm", a.heads * a.head_dim, a.kv_heads),
    ):
        groups = heads if each else 1
        program.norm(norm, f"{path}.{name}", qkv, qkv, at=at, groups=groups, **says)


def _heads_of_a_chunk(heads: int, kv_heads: int, threads: int) -> int:
    """Query heads that look at keys together: those of a key head, or fewer where that makes too
    few chunks for the threads."""
    group = heads // kv_heads
    parts = 1
    while group % (2 * parts) == 0 and kv_heads * parts < 2 * threads:
        parts *= 2
    return group // parts


def mla(program: Program, m: MLA, place: Place) -> None:
    """Queries go into the space of the latent, where one row is key and value for all heads."""
    path, R, each = place.path, m.kv_lora_rank, m.nope_dim + m.rope_dim
    row = R + m.rope_dim
    gate = _latent_queries(program, m, place)
    q, latent = program.buffer("queries", m.heads * each), program.buffer("latent row", row)
    program.linear(f"{path}.kv_a_proj", place.h, latent, row, m.hidden)
    if m.latent_norm is not None:
        program.norm(m.latent_norm, f"{path}.kv_a_norm", latent, latent)
    program.scale(latent, R, m.kv_latent_scale)
    program.turn(m.rope, latent, 1, row, at=R)
    program.turn(m.rope, q, m.heads, each, at=m.nope_dim)
    if m.temperature_scale:
        numbers = {"number": m.temperature_scale, "floor": m.temperature_floor}
        program.add("warm", x=q, cols=m.heads * each, flags=native.ONE_LESS, **numbers)
    asked = program.buffer("asked", m.heads * row)
    found, mixed = program.buffer("found", m.heads * R), program.buffer("mixed", m.heads * m.v_dim)
    weight = program.address(f"{path}.kv_b_proj.weight")
    expansion = {
        "weight": weight,
        "heads": m.heads,
        "rows": m.nope_dim,
        "cols": R,
        "v_dim": m.v_dim,
    }
    program.add("absorb", x=q, y=asked, turned=m.rope_dim, **expansion)
    running: Any = program.shared.operators[place.number]
    cache = {"kv_heads": 1, "key_step": row, "value_step": row, "keys": running.cache.data_ptr()}
    program.add("store", x=latent, **cache)
    sizes = {"heads": m.heads, "head_dim": row, "v_dim": R, "values": cache["keys"]}
    sizes["flags"] = native.SHARES | native.ROUNDED
    groups = _heads_of_a_chunk(m.heads, 1, program.threads)
    program.add("attend", x=asked, groups=groups, number=m.scale, **sizes, **cache)
    program.add("merge", y=found, **sizes, **cache)
    program.add("expand", x=found, y=mixed, head_dim=R, **expansion)
    if m.gate != "none":
        own = m.gate == "in_q_proj"  # whose sigmoid is not rounded before it is multiplied
        gates = m.heads * m.v_dim if own else m.heads
        columns = {"cols": m.heads * m.v_dim, "groups": gates}
        program.add("gated", x=gate, y=mixed, flags=native.WIDE * own, **columns)
    program.linear(f"{path}.o_proj", mixed, place.y, m.hidden, m.heads * m.v_dim)


def _latent_queries(program: Program, m: MLA, place: Place) -> int:
    """Fills `queries`; the buffer of what gates the output."""
    path, each = place.path, m.nope_dim + m.rope_dim
    wide = each + (m.v_dim if m.gate == "in_q_proj" else 0)
    q = program.buffer("raw" if wide > each else "queries", m.heads * wide)
    if m.q_lora_rank:
        rank, raw = m.q_lora_rank, program.buffer("query latent", m.q_lora_rank)
        latent = program.buffer("query latents", 2 * rank)
        program.linear(f"{path}.q_a_proj", place.h, raw, rank, m.hidden)
        if m.q_latent_norm is None:
            program.copy(raw, latent, rank)
        else:
            program.norm(m.q_latent_norm, f"{path}.q_a_norm", raw, latent)
        if m.q_reads_raw:
            program.copy(raw, latent, rank, to=rank)
        cols = rank * (1 + m.q_reads_raw)
        program.linear(f"{path}.q_b_proj", latent, q, m.heads * wide, cols)
        program.scale(q, m.heads * wide, m.q_latent_scale)
    else:
        program.linear(f"{path}.q_proj", place.h, q, m.heads * wide, m.hidden)
    gate = program.buffer("opening", m.heads * m.v_dim)
    if m.gate == "in_q_proj":
        apart = {"groups": m.heads, "step": wide}
        program.copy(q, program.buffer("queries", m.heads * each), each, to_step=each, **apart)
        program.copy(q, gate, m.v_dim, at=each, to_step=m.v_dim, **apart)
    elif m.gate == "sigmoid_per_head":
        program.linear(f"{path}.gate_proj", place.h, gate, m.heads, m.hidden)
    return gate
