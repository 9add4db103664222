"""Multi-head latent attention over a cache of latent rows, and the indexer that limits its sight.

Every token is one row of `kv_lora_rank` + `rope_dim` numbers, whatever the number of heads. Prompts
expand the rows they see into keys and values; a single token takes the expansion to its own side
instead: its query is brought into the space of the latent, and what it read is expanded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from moescope.engine.mlx_operators.attention import of_lanes, written
from moescope.engine.mlx_operators.common import DTYPES, Call, Held, Weights
from moescope.engine.mlx_operators.matrix import Matrix, array, matrix
from moescope.engine.mlx_operators.norms import load_norm
from moescope.engine.mlx_operators.rope import rotate
from moescope.engine.operators import MLA, Indexer


class MLXMLA:
    """State: [lanes, capacity, kv_lora_rank + rope_dim], the normed latent, then the turned key
    part that all heads share; and the indexer's keys, where there is one."""

    def __init__(self, spec: MLA, weights: Weights, path: str, dtype: str) -> None:
        self.spec, self.dtype = spec, DTYPES[dtype]
        self.queries = _queries(spec, weights, path)
        self.kv_a, self.kv_b, self.out = (
            matrix(weights[f"{path}.{name}.weight"])
            for name in ("kv_a_proj", "kv_b_proj", "o_proj")
        )
        self.kv_a_bias, self.out_bias = (
            array(weights[f"{path}.{name}.bias"]) if spec.bias else None
            for name in ("kv_a_proj", "o_proj")
        )
        self.kv_norm = load_norm(spec.latent_norm, weights, f"{path}.kv_a_norm")
        heads = self.kv_b.whole().reshape(spec.heads, -1, spec.kv_lora_rank)
        self.to_keys = heads[:, : spec.nope_dim]
        self.to_values = heads[:, spec.nope_dim :].swapaxes(1, 2)
        self.gate: Matrix | None = None  # [heads, H]
        if spec.gate == "sigmoid_per_head":
            self.gate = matrix(weights[f"{path}.gate_proj.weight"])
        self.indexer: MLXIndexer | None = None
        if spec.indexer is not None:
            self.indexer = MLXIndexer(spec.indexer, weights, f"{path}.indexer", dtype)

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        width = self.spec.kv_lora_rank + self.spec.rope_dim
        own = Held((lanes, 1, capacity, width), self.dtype)
        return (own,) if self.indexer is None else (own, *self.indexer.state(lanes, capacity))

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s = self.spec
        latent, q = self.queries(h)
        gate = None
        if s.gate == "in_q_proj":
            q, gate = mx.split(q, [s.nope_dim + s.rope_dim], -1)
        elif self.gate is not None:
            gate = self.gate(h)[..., None]
        q, rows = self._turned(q, h, call)
        call.state[0] = written(call.state[0], rows[:, None], call)
        if self.indexer is not None:
            assert latent is not None
            call.choice = self.indexer(h, latent, call)
        limited = self.indexer is not None or s.shares_choice
        seen = call.choice if limited else None
        mixed = (self._one_each if call.decodes else self._many)(q, seen, call)
        if gate is not None:
            gate = mx.sigmoid(gate.astype(mx.float32))
            gate = gate if s.gate == "in_q_proj" else gate.astype(mixed.dtype)
            mixed = (mixed * gate).astype(h.dtype)
        return self.out(mixed.flatten(1), self.out_bias)

    def _turned(self, q: mx.array, h: mx.array, call: Call) -> tuple[mx.array, mx.array]:
        """Queries [R, heads, nope + rope] and new rows of the cache [R, latent + rope], both with
        their rope parts turned to their positions."""
        s = self.spec
        latent, turning = mx.split(self.kv_a(h, self.kv_a_bias), [s.kv_lora_rank], -1)
        if self.kv_norm is not None:
            latent = self.kv_norm(latent)
        if s.kv_latent_scale != 1.0:
            latent = latent * s.kv_latent_scale
        if s.rope is not None:
            rotation = call.rotations[id(s.rope)]
            still, moving = mx.split(q, [s.nope_dim], -1)
            q = mx.concatenate([still, rotate(moving, s.rope, rotation)], -1)
            turning = rotate(turning[:, None], s.rope, rotation)[:, 0]
        if s.temperature_scale:
            steps = mx.floor(call.positions.astype(mx.float32) / s.temperature_floor)
            warmth = (mx.log1p(steps) * s.temperature_scale + 1).astype(q.dtype)
            q = q * warmth[:, None, None]
        return q, mx.concatenate([latent, turning], -1)

    def _one_each(self, q: mx.array, seen: mx.array | None, call: Call) -> mx.array:
        """q [N, heads, D], one token of each lane -> [N, heads, v_dim]: no row is expanded."""
        s, static = self.spec, call.static
        rows = of_lanes(call.state[0], static.lanes, static.seen)[:, 0]  # [N, S, latent + rope]
        still, moving = mx.split(q, [s.nope_dim], -1)
        inner = (still.swapaxes(0, 1) @ self.to_keys).swapaxes(0, 1)  # [N, heads, latent]
        query = mx.concatenate([inner, moving], -1)
        scores = query @ rows.swapaxes(1, 2) * s.scale  # [N, heads, S]
        mask = mx.arange(static.seen) <= call.positions[:, None]
        mask = mask if seen is None else mask & seen
        scores = mx.where(mask[:, None], scores, -mx.inf)
        shares = mx.softmax(scores, -1, precise=True)
        mixed = shares @ rows[..., : s.kv_lora_rank]
        return (mixed.swapaxes(0, 1) @ self.to_values).swapaxes(0, 1)

    def _many(self, q: mx.array, seen: mx.array | None, call: Call) -> mx.array:
        """q [T, heads, D], the last T of the rows that the lane holds -> [T, heads, v_dim]."""
        s, static = self.spec, call.static
        (lane,), S = static.lanes, static.start + static.tokens
        latent, turned = mx.split(call.state[0][lane, 0, :S], [s.kv_lora_rank], -1)
        still, values = mx.split(self.kv_b(latent).reshape(S, s.heads, -1), [s.nope_dim], -1)
        shared = mx.broadcast_to(turned[:, None], (S, s.heads, s.rope_dim))
        keys = mx.concatenate([still, shared], -1)
        arrays = (x.swapaxes(0, 1)[None] for x in (q, keys, values))
        mask: mx.array | str = "causal" if seen is None else seen[None, None]
        out = mx.fast.scaled_dot_product_attention(*arrays, scale=s.scale, mask=mask)
        return out[0].swapaxes(0, 1)


class MLXIndexer:
    """Chooses, for every query, the `topk` tokens it sees. Its keys are kept as they are turned."""

    def __init__(self, spec: Indexer, weights: Weights, path: str, dtype: str) -> None:
        self.spec, self.dtype = spec, DTYPES[dtype]
        self.q_proj, self.k_proj, self.weights = (
            matrix(weights[f"{path}.{name}.weight"]) for name in ("q_proj", "k_proj", "weights")
        )
        self.norm = load_norm(spec.norm, weights, f"{path}.k_norm")

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        return (Held((lanes, 1, capacity, self.spec.head_dim), self.dtype),)

    def __call__(self, h: mx.array, latent: mx.array, call: Call) -> mx.array | None:
        """Which of S tokens every row sees [R, S]; None: all before it."""
        s, static = self.spec, call.static
        k = self.k_proj(h)[:, None]
        k = k if self.norm is None else self.norm(k)
        q = self.q_proj(latent).reshape(len(h), s.heads, s.head_dim)
        if s.rope is not None:
            q, k = (rotate(x, s.rope, call.rotations[id(s.rope)]) for x in (q, k))
        call.state[1] = written(call.state[1], k, call)
        S = static.seen if call.decodes else static.start + static.tokens
        if s.topk >= S:
            return None
        keys = of_lanes(call.state[1], static.lanes, S).astype(mx.float32)  # [N, 1, S, D]
        # transformers keeps this one matrix in float32
        weights = self.weights(h.astype(mx.float32)) * s.heads**-0.5
        rows = q.astype(mx.float32).reshape(len(static.lanes), static.tokens, s.heads, -1)
        scores = mx.maximum(rows @ keys.swapaxes(2, 3) * s.head_dim**-0.5, 0)
        sums = (weights[:, None] @ scores.reshape(len(h), s.heads, S))[:, 0]  # [R, S]
        allowed = mx.arange(S) <= call.positions[:, None]
        ranks = mx.argsort(mx.argsort(-mx.where(allowed, sums, -mx.inf), -1), -1)
        return allowed & (ranks < s.topk)


def _queries(
    s: MLA, weights: Weights, path: str
) -> Callable[[mx.array], tuple[mx.array | None, mx.array]]:
    """h [R, H] -> the normed latent of the queries, if they have one, and q [R, heads, D]."""
    if not s.q_lora_rank:
        whole = matrix(weights[f"{path}.q_proj.weight"])
        return lambda h: (None, whole(h).reshape(len(h), s.heads, -1))
    down, up = (matrix(weights[f"{path}.{name}.weight"]) for name in ("q_a_proj", "q_b_proj"))
    bias = array(weights[f"{path}.q_a_proj.bias"]) if s.bias else None
    norm = load_norm(s.q_latent_norm, weights, f"{path}.q_a_norm")

    def through_latent(h: mx.array) -> tuple[mx.array, mx.array]:
        raw = down(h, bias)
        latent = raw if norm is None else norm(raw)
        q = up(mx.concatenate([latent, raw], -1) if s.q_reads_raw else latent)
        q = q if s.q_latent_scale == 1.0 else q * s.q_latent_scale
        return latent, q.reshape(len(h), s.heads, -1)

    return through_latent
