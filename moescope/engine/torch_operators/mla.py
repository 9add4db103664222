"""Multi-head latent attention over a cache of latent rows, and the indexer that limits its sight.

Every token is one row of `kv_lora_rank` + `rope_dim` numbers, whatever the number of heads. Prompts
expand the rows they see into keys and values; a single token takes the expansion to its own side
instead: its query is brought into the space of the latent, and what it read is expanded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import MLA, Indexer
from moescope.engine.torch_operators.common import Call, Weights, linear, split
from moescope.engine.torch_operators.norms import load_norm
from moescope.engine.torch_operators.rope import rotate

QUERY_BLOCK = 512
INDEX_BLOCK = 64  # queries scored at once: the scores are [block, index heads, S]


class TorchMLA:
    """`cache` [lanes, capacity, kv_lora_rank + rope_dim]: the normed latent, then the turned key
    part that all heads share."""

    def __init__(self, spec: MLA, weights: Weights, path: str, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.queries = _queries(spec, weights, path)
        self.kv_a = weights[f"{path}.kv_a_proj.weight"]
        self.kv_a_bias = weights.get(f"{path}.kv_a_proj.bias")
        self.kv_norm = load_norm(spec.latent_norm, weights, f"{path}.kv_a_norm")
        self.kv_b = weights[f"{path}.kv_b_proj.weight"]
        heads = self.kv_b.view(spec.heads, spec.nope_dim + spec.v_dim, spec.kv_lora_rank)
        self.to_keys, self.to_values = heads[:, : spec.nope_dim], heads[:, spec.nope_dim :]
        self.out = weights[f"{path}.o_proj.weight"]
        self.out_bias = weights.get(f"{path}.o_proj.bias")
        self.gate = weights.get(f"{path}.gate_proj.weight")  # [heads, H]
        self.cache = torch.empty(0)
        self.indexer: TorchIndexer | None = None
        if spec.indexer is not None:
            self.indexer = TorchIndexer(spec.indexer, weights, f"{path}.indexer", dtype)

    # --- state ------------------------------------------------------------------------------

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Allocate the cache, keeping what it holds."""
        width = self.spec.kv_lora_rank + self.spec.rope_dim
        self.cache = _grown(self.cache, (lanes, capacity, width), self.dtype, device)
        if self.indexer is not None:
            self.indexer.open(lanes, capacity, device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` rows of `source`."""
        self.cache[target, :length] = self.cache[source, :length]
        if self.indexer is not None:
            self.indexer.copy(source, target, length)

    # --- running ----------------------------------------------------------------------------

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        s = self.spec
        latent, q, gate, rows = self.projected(h, call)
        if self.indexer is not None:
            assert latent is not None
            call.choices[:] = self.indexer(h, latent, call)
        limited = self.indexer is not None or s.shares_choice
        parts = []
        for n, (lane, start, span) in enumerate(call.spans()):
            end = start + call.tokens
            self.cache[lane, start:end] = rows[span]
            seen = call.choices[n] if limited and call.choices else None
            attend = self._one if call.tokens == 1 else self._many
            parts.append(attend(q[span], self.cache[lane, :end], seen))
        return self.finish(parts[0] if len(parts) == 1 else torch.cat(parts), gate)

    def projected(
        self, h: Tensor, call: Call
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """The latent of the queries, queries [R, heads, nope + rope], what gates the output, and
        the new rows of the cache [R, latent + rope]."""
        s = self.spec
        latent, q = self.queries(h)
        gate = None
        if s.gate == "in_q_proj":
            q, gate = split(q, s.nope_dim + s.rope_dim, s.v_dim)
        elif self.gate is not None:
            gate = linear(h, self.gate)[..., None]
        q, rows = self._turned(q, h, call)
        return latent, q, gate, rows

    def finish(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """mixed [R, heads, v_dim], gated -> [R, H]."""
        if gate is not None:
            wide = torch.sigmoid(gate.float())
            wide = wide if self.spec.gate == "in_q_proj" else wide.to(mixed.dtype)
            mixed = (mixed * wide).to(mixed.dtype)
        return linear(mixed.flatten(1), self.out, self.out_bias)

    def _turned(self, q: Tensor, h: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Queries [R, heads, nope + rope] and new rows of the cache [R, latent + rope], both with
        their rope parts turned to their positions."""
        s = self.spec
        latent, turning = split(linear(h, self.kv_a, self.kv_a_bias), s.kv_lora_rank, s.rope_dim)
        if self.kv_norm is not None:
            latent = self.kv_norm(latent)
        if s.kv_latent_scale != 1.0:
            latent = latent * s.kv_latent_scale
        if s.rope is not None:
            rotation = call.rotations[id(s.rope)]
            still, moving = split(q, s.nope_dim, s.rope_dim)
            q = torch.cat((still, rotate(moving, s.rope, rotation)), -1)
            turning = rotate(turning[:, None], s.rope, rotation)[:, 0]
        if s.temperature_scale:
            steps = torch.floor(call.positions.float() / s.temperature_floor)
            warmth = (torch.log1p(steps) * s.temperature_scale + 1).to(q.dtype)
            q = q * warmth[:, None, None]
        return q, torch.cat((latent, turning), -1)

    def _one(self, q: Tensor, rows: Tensor, seen: Tensor | None) -> Tensor:
        """q [1, heads, D] over rows [S, latent + rope]: no row is expanded."""
        s = self.spec
        if seen is not None:
            rows = rows[seen[0].to(rows.device)]
        still, moving = split(q[0], s.nope_dim, s.rope_dim)
        inner = torch.bmm(still[:, None], self.to_keys)[:, 0]
        scores = torch.cat((inner, moving), -1) @ rows.T * s.scale
        shares = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        mixed = shares @ rows[:, : s.kv_lora_rank]  # [heads, latent]
        return torch.bmm(mixed[:, None], self.to_values.transpose(1, 2))[:, 0][None]

    def _many(self, q: Tensor, rows: Tensor, seen: Tensor | None) -> Tensor:
        """q [T, heads, D], the last T of rows [S, latent + rope]; `seen` [T, S]."""
        s, S, start = self.spec, len(rows), len(rows) - len(q)
        latent, turned = split(rows, s.kv_lora_rank, s.rope_dim)
        expanded = linear(latent, self.kv_b).view(S, s.heads, -1)
        still, values = split(expanded, s.nope_dim, s.v_dim)
        keys = torch.cat((still, turned[:, None].expand(S, s.heads, s.rope_dim)), -1)
        width = max(s.nope_dim + s.rope_dim, s.v_dim)  # one width, for kernels that want one
        q, keys, values = (
            F.pad(x, (0, width - x.shape[-1])).transpose(0, 1) for x in (q, keys, values)
        )
        return _attend(q, keys, values, start, seen, s.scale)[..., : s.v_dim].transpose(0, 1)


class TorchIndexer:
    """Chooses, for every query, the `topk` tokens it sees. Its keys are kept as they are turned."""

    def __init__(self, spec: Indexer, weights: Weights, path: str, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.q_proj, self.k_proj = (
            weights[f"{path}.q_proj.weight"],
            weights[f"{path}.k_proj.weight"],
        )
        self.weights = weights[f"{path}.weights.weight"]
        self.norm = load_norm(spec.norm, weights, f"{path}.k_norm")
        self.cache = torch.empty(0)

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Allocate the keys, keeping what there is."""
        self.cache = _grown(self.cache, (lanes, capacity, self.spec.head_dim), self.dtype, device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` keys of `source`."""
        self.cache[target, :length] = self.cache[source, :length]

    def __call__(self, h: Tensor, latent: Tensor, call: Call) -> list[Tensor | None]:
        """Per lane, which of its S tokens each of T queries sees [T, S]; None: all before it."""
        s = self.spec
        k, q, weights = self.keys(h, call), self.queries(latent, call), self.head_weights(h)
        choices: list[Tensor | None] = []
        for lane, start, span in call.spans():
            end = start + call.tokens
            self.cache[lane, start:end] = k[span]
            seen = None
            if end > s.topk:
                seen = self._choose(q[span], weights[span], self.cache[lane, :end])
            choices.append(seen)
        return choices

    def keys(self, h: Tensor, call: Call) -> Tensor:
        """h [R, H] -> new rows of the cache [R, D]."""
        k: Tensor = linear(h, self.k_proj)[:, None]
        k = k if self.norm is None else self.norm(k)
        rope = self.spec.rope
        k = k if rope is None else rotate(k, rope, call.rotations[id(rope)])
        rows: Tensor = k.flatten(1)
        return rows

    def queries(self, latent: Tensor, call: Call) -> Tensor:
        """[R, heads, D]"""
        s = self.spec
        q = linear(latent, self.q_proj).view(len(latent), s.heads, s.head_dim)
        return q if s.rope is None else rotate(q, s.rope, call.rotations[id(s.rope)])

    def head_weights(self, h: Tensor) -> Tensor:
        """[R, heads] float32; transformers keeps this one matrix in float32."""
        wide = linear(h.to(self.weights.dtype), self.weights).float()
        return wide * float(self.spec.heads**-0.5)

    def scores(self, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """q [R, heads, D] and weights [R, heads] over keys [S, D] or [R, S, D] -> [R, S]."""
        each = F.relu(q.float() @ keys.float().transpose(-1, -2) * self.spec.head_dim**-0.5)
        sums: Tensor = (weights[:, None] @ each)[:, 0]
        return sums

    def _choose(self, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        s, T, S = self.spec, len(q), len(keys)
        seen = torch.zeros(T, S, dtype=torch.bool, device=q.device)
        places = torch.arange(S, device=q.device)
        for at in range(0, T, INDEX_BLOCK):
            block = slice(at, at + INDEX_BLOCK)
            own = torch.arange(S - T, S, device=q.device)[block, None]
            sums = self.scores(q[block], weights[block], keys)
            sums = sums.masked_fill(places > own, -torch.inf)
            seen[block].scatter_(1, sums.topk(s.topk, -1).indices, True)
            seen[block] &= places <= own
        return seen


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, start: int, seen: Tensor | None, scale: float
) -> Tensor:
    """Causal attention of q [heads, T, D] from position `start` over [heads, S, D]; in blocks
    unless nothing need be masked by hand."""
    if start == 0 and seen is None:
        arrays = (q[None], keys[None], values[None])
        return F.scaled_dot_product_attention(*arrays, is_causal=True, scale=scale)[0]
    blocks = []
    for at in range(0, q.shape[1], QUERY_BLOCK):
        block = q[:, at : at + QUERY_BLOCK]
        end = start + at + block.shape[1]
        if seen is None:
            query = torch.arange(start + at, end, device=q.device)[:, None]
            mask = torch.arange(end, device=q.device)[None] <= query
        else:
            mask = seen[at : at + QUERY_BLOCK, :end].to(q.device)
        arrays = (block[None], keys[None, :, :end], values[None, :, :end])
        blocks.append(F.scaled_dot_product_attention(*arrays, mask, scale=scale)[0])
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _queries(
    s: MLA, weights: Weights, path: str
) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    """h [R, H] -> the normed latent of the queries, if they have one, and q [R, heads, D]."""
    if not s.q_lora_rank:
        whole = weights[f"{path}.q_proj.weight"]
        return lambda h: (None, linear(h, whole).view(len(h), s.heads, -1))
    down, bias = weights[f"{path}.q_a_proj.weight"], weights.get(f"{path}.q_a_proj.bias")
    up = weights[f"{path}.q_b_proj.weight"]
    norm = load_norm(s.q_latent_norm, weights, f"{path}.q_a_norm")

    def through_latent(h: Tensor) -> tuple[Tensor, Tensor]:
        raw = linear(h, down, bias)
        latent = raw if norm is None else norm(raw)
        q = linear(torch.cat((latent, raw), -1) if s.q_reads_raw else latent, up)
        q = q if s.q_latent_scale == 1.0 else q * s.q_latent_scale
        return latent, q.view(len(h), s.heads, -1)

    return through_latent


def _grown(held: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A larger cache with what `held` has."""
    new = torch.zeros(shape, dtype=dtype, device=device)
    if held.numel():
        new[: held.shape[0], : held.shape[1]] = held
    return new
