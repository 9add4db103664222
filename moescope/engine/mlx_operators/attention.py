"""Softmax attention with grouped keys and values over a cache that does not move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from moescope.engine.mlx_operators.activations import softplus
from moescope.engine.mlx_operators.common import DTYPES, Call, Held, Weights
from moescope.engine.mlx_operators.matrix import Matrix, array, matrix
from moescope.engine.mlx_operators.norms import make_norm
from moescope.engine.mlx_operators.rope import rotate
from moescope.engine.operators import Attention


class CachedAttention:
    """Attention over keys and values that lanes keep: [lanes, kv heads, capacity, D] and [.., Dv].
    What a lane does not hold yet is masked, so a step of one shape serves every position."""

    def __init__(self, spec: Attention, dtype: str) -> None:
        self.spec, self.dtype = spec, DTYPES[dtype]
        self.v_dim = spec.v_head_dim or spec.head_dim
        self.sinks: mx.array | None = None

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        """Keys and values of every token."""
        shape = (lanes, self.spec.kv_heads, capacity)
        return tuple(
            Held((*shape, width), self.dtype) for width in (self.spec.head_dim, self.v_dim)
        )

    def attend(self, q: mx.array, k: mx.array, v: mx.array, call: Call) -> mx.array:
        """q [R, heads, D] over what its lane holds and the new k [R, kv heads, D] and v -> [R,
        heads × Dv]."""
        return (self._one_each if call.decodes else self._many)(q, k, v, call)

    def _one_each(self, q: mx.array, k: mx.array, v: mx.array, call: Call) -> mx.array:
        """One token of each lane, at positions that are read at run time."""
        lanes, seen = call.static.lanes, call.static.seen
        call.state = [
            written(cache, new, call) for cache, new in zip(call.state, (k, v), strict=True)
        ]
        keys, values = (of_lanes(cache, lanes, seen) for cache in call.state)
        mask = self._mask(call, mx.arange(seen))[:, None]  # [N, 1, 1, S]
        return self._attend(q[:, :, None], keys, values, mask).reshape(len(q), -1)

    def _many(self, q: mx.array, k: mx.array, v: mx.array, call: Call) -> mx.array:
        """T tokens of one lane, after those it holds."""
        static = call.static
        (lane,), end = static.lanes, static.start + static.tokens
        call.state = [
            written(cache, new, call) for cache, new in zip(call.state, (k, v), strict=True)
        ]
        first = self._first_seen(static.start)
        keys, values = (cache[lane : lane + 1, :, first:end] for cache in call.state)
        mask: mx.array | str = "causal"
        if first or self._first_seen(end - 1):
            mask = self._mask(call, mx.arange(first, end))[:, 0][None, None]  # [1, 1, T, S]
        out = self._attend(q.swapaxes(0, 1)[None], keys, values, mask)
        return out[0].swapaxes(0, 1).reshape(len(q), -1)

    def _first_seen(self, position: int) -> int:
        """The first position that a query sees."""
        s = self.spec
        if s.window:
            return max(0, position - s.window + 1)
        return position // s.chunk * s.chunk if s.chunk else 0

    def _mask(self, call: Call, keys: mx.array) -> mx.array:
        """Which keys (positions [S]) every row sees: [R, 1, S]. Layers that see alike share it."""
        s = self.spec
        found = call.masks.get((s.window, s.chunk))
        if found is None:
            at = call.positions[:, None, None]
            found = keys <= at
            if s.window:
                found = found & (keys > at - s.window)
            if s.chunk:
                found = found & (keys >= at // s.chunk * s.chunk)
            call.masks[s.window, s.chunk] = found
        return found

    def _attend(
        self, q: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str
    ) -> mx.array:
        """q [N, heads, T, D] over keys [N, kv heads, S, D] -> [N, heads, T, Dv]."""
        s = self.spec
        if not (s.softcap or s.float32_scores):
            return mx.fast.scaled_dot_product_attention(
                q, keys, values, scale=s.scale, mask=mask, sinks=self.sinks
            )
        wide = s.float32_scores
        return attend(q, keys, values, mask, s.scale, s.softcap, self.sinks, wide)


class MLXAttention(CachedAttention):
    """Projections, norms and rotation before attention; a gate and a projection after it."""

    def __init__(self, spec: Attention, weights: Weights, path: str, dtype: str) -> None:
        super().__init__(spec, dtype)
        self.qkv, self.out = (matrix(weights[f"{path}.{n}.weight"]) for n in ("qkv", "o_proj"))
        self.qkv_bias = array(weights[f"{path}.qkv.bias"]) if spec.qkv_bias else None
        self.out_bias = array(weights[f"{path}.o_proj.bias"]) if spec.out_bias else None
        self.normalise = _qk_norms(spec, weights, path)
        self.v_norm = None if spec.v_norm is None else make_norm(spec.v_norm)
        self.sinks = array(weights[f"{path}.sinks"]) if spec.sinks else None
        self.gate: Matrix | None = None
        if spec.gate not in ("none", "in_q_proj"):
            self.gate = matrix(weights[f"{path}.gate_proj.weight"])
        self.gate_bias = array(weights[f"{path}.gate_bias"]) if spec.gate_bias else None

    def __call__(self, h: mx.array, call: Call) -> mx.array:
        s = self.spec
        qk, v, gate = self._project(h)
        qk = self._place(qk, call)
        mixed = self.attend(qk[:, : s.heads], qk[:, s.heads :], v, call)  # [R, heads × Dv]
        if s.gate != "none":
            mixed = self._gated(mixed, h, gate)
        return self.out(mixed, self.out_bias)

    def _project(self, h: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
        """qk [R, (heads + kv heads) × D], v [R, kv heads, Dv], and what gates the output."""
        s, R = self.spec, len(h)
        qkv = self.qkv(h, self.qkv_bias)
        gate = None
        if s.gate == "in_q_proj":
            wide = s.heads * s.head_dim
            pairs = qkv[:, : 2 * wide].reshape(R, s.heads, 2, s.head_dim)
            gate = pairs[:, :, 1].reshape(R, wide)
            qkv = mx.concatenate([pairs[:, :, 0].reshape(R, wide), qkv[:, 2 * wide :]], -1)
        split = (s.heads + s.kv_heads) * s.head_dim
        qk = qkv[:, :split]
        v = qk[:, s.heads * s.head_dim :] if s.keys_are_values else qkv[:, split:]
        if s.clip_qkv is not None:
            v = mx.clip(v, -s.clip_qkv, s.clip_qkv)
        v = v.reshape(R, s.kv_heads, self.v_dim)
        if self.v_norm is not None:
            v = self.v_norm(v)
        return qk, v if s.value_scale == 1.0 else v * s.value_scale, gate

    def _place(self, qk: mx.array, call: Call) -> mx.array:
        """Queries and keys [R, heads + kv heads, D], normalised and turned to their positions."""
        s = self.spec
        if not s.qk_norm_after_rope:
            qk = self.normalise(qk)
        if s.clip_qkv is not None:
            qk = mx.clip(qk, -s.clip_qkv, s.clip_qkv)
        qk = qk.reshape(len(qk), s.heads + s.kv_heads, s.head_dim)
        if s.rope is not None:
            qk = rotate(qk, s.rope, call.rotations[id(s.rope)])
        if s.qk_norm_after_rope:
            qk = self.normalise(qk.flatten(1)).reshape(qk.shape)
        if s.temperature_scale:
            warmth = _WARMTH[s.temperature_kind](call.positions.astype(mx.float32) + 1, s)
            queries = (qk[:, : s.heads] * warmth[:, None, None]).astype(qk.dtype)
            qk = mx.concatenate([queries, qk[:, s.heads :]], 1)
        return qk

    def _gated(self, mixed: mx.array, h: mx.array, gate: mx.array | None) -> mx.array:
        if gate is None:
            assert self.gate is not None
            gate = self.gate(h)
            if self.gate_bias is not None:
                gate = gate.reshape(len(h), self.spec.heads, -1) + self.gate_bias[:, None]
                gate = gate.flatten(1)
        if self.spec.gate.startswith("softplus"):
            gate = softplus(gate.astype(mx.float32)).astype(mixed.dtype)
        else:
            gate = mx.sigmoid(gate)
        if gate.shape[-1] == mixed.shape[-1]:
            return mixed * gate
        heads = mixed.reshape(len(mixed), self.spec.heads, -1)
        return (heads * gate[..., None]).reshape(mixed.shape)


# What queries are multiplied by, for positions counted from 1 (Llama 4; Beam).
_WARMTH: dict[str, Callable[[mx.array, Attention], mx.array]] = {
    "log": lambda at, s: mx.log1p(mx.floor(at / s.temperature_floor)) * s.temperature_scale + 1,
    "power": lambda at, s: mx.exp(s.temperature_scale * mx.log1p(at / s.temperature_floor)),
}


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | str,
    scale: float,
    softcap: float,
    sinks: mx.array | None,
    wide: bool,
) -> mx.array:
    """Attention in plain products, with what MLX's own has not: a softcap on the scores, and scores
    that are not rounded to the dtype of queries and keys."""
    N, heads, T, _ = q.shape
    groups, S, dtype = keys.shape[1], keys.shape[2], q.dtype
    q = q.reshape(N, groups, heads // groups, T, -1)
    if wide:
        q, keys = q.astype(mx.float32), keys.astype(mx.float32)
    scores = q @ keys[:, :, None].swapaxes(-1, -2) * scale  # [N, kv heads, G, T, S]
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    if isinstance(mask, str):
        mask = mx.arange(S)[None] <= mx.arange(S - T, S)[:, None]
    else:
        mask = mask[:, :, None]
    scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        extra = sinks.astype(scores.dtype).reshape(groups, -1, 1, 1)
        extra = mx.broadcast_to(extra, (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, extra], -1)
    shares = mx.softmax(scores, -1, precise=True)[..., :S].astype(dtype)
    return (shares @ values[:, :, None]).reshape(N, heads, T, -1)


def written(cache: mx.array, new: mx.array, call: Call) -> mx.array:
    """`cache` [lanes, heads, capacity, D] with `new` [R, heads, D] at the positions of its rows."""
    lanes, new = call.static.lanes, new.astype(cache.dtype)
    if not call.decodes or len(lanes) == 1:
        rows = new.swapaxes(0, 1)[None]
        return mx.slice_update(cache, rows, _corner(call), (0, 2))
    found = cache[...]  # what follows assigns to the name, not to the caller's array
    found[mx.array(lanes), :, call.positions] = new
    return found


def _corner(call: Call) -> mx.array:
    """Lane and position that the rows of a call of one lane begin at."""
    if call.corner is None:
        lane = mx.array(call.static.lanes, mx.int32)
        call.corner = mx.concatenate([lane, call.positions[:1]])
    return call.corner


def of_lanes(cache: mx.array, lanes: tuple[int, ...], seen: int) -> mx.array:
    """The first `seen` rows of the lanes; a view, unless lanes are missing in between."""
    first, last = lanes[0], lanes[-1]
    if lanes == tuple(range(first, last + 1)):
        return cache[first : last + 1, :, :seen]
    return cache[mx.array(lanes), :, :seen]


def _qk_norms(s: Attention, weights: Weights, path: str) -> Callable[[mx.array], mx.array]:
    """Normalises q and k, side by side in the columns of qk [R, (heads + kv heads) × D]."""
    if s.qk_norm is None:
        return lambda qk: qk
    k_spec = s.kv_norm or s.qk_norm

    def of(spec: object, name: str, kind: str) -> mx.array | None:
        return array(weights[f"{path}.{name}.{kind}"]) if getattr(spec, kind) else None

    q_norm, k_norm = (
        make_norm(spec, of(spec, name, "weight"), of(spec, name, "bias"))
        for spec, name in ((s.qk_norm, "q_norm"), (k_spec, "k_norm"))
    )
    split = s.heads * s.head_dim
    if s.qk_norm_over == "flat":
        return lambda qk: mx.concatenate([q_norm(qk[:, :split]), k_norm(qk[:, split:])], -1)

    def per_head(qk: mx.array) -> mx.array:
        heads = qk.reshape(len(qk), -1, s.head_dim)
        parts = [q_norm(heads[:, : s.heads]), k_norm(heads[:, s.heads :])]
        return mx.concatenate(parts, 1).flatten(1)

    return per_head
