"""Operators without a fused form, in torch operators that a graph can hold: one token of each of N
lanes, shapes that no length changes, and lanes and positions read from the device.

What they compute before and behind their state is the torch operators' own code; here is what
stands between: the state of the lanes, gathered and put back by their numbers. Attention over
latent rows looks at the first `reach` positions of the cache and masks what lies behind a lane's
end.

Letters: N lanes, H hidden, S the positions in reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.torch_operators.attention import CachedAttention
from moescope.engine.torch_operators.common import Call, convolution, linear, split
from moescope.engine.torch_operators.convolved_attention import TorchConvolvedAttention
from moescope.engine.torch_operators.linear_attention import Delta
from moescope.engine.torch_operators.mla import TorchIndexer, TorchMLA
from moescope.engine.torch_operators.recurrent import Recurrent
from moescope.engine.torch_operators.rope import rotate
from moescope.engine.torch_operators.routed_attention import TorchRoutedAttention
from moescope.engine.torch_operators.short_conv import TorchShortConv
from moescope.engine.torch_operators.state_space import Mamba1, Mamba2


@dataclass(slots=True)
class Static:
    """What these operators are given beside the hidden state."""

    lanes: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    places: Tensor  # [S], the positions in reach
    seen: Tensor  # [N, S]: those up to a lane's own
    call: Call  # token ids, positions and rotations; no lanes
    chosen: Tensor | None = None  # [N, S], what the last indexer lets be seen

    @classmethod
    def of(cls, lanes: Tensor, positions: Tensor, reach: int, call: Call) -> Static:
        places = torch.arange(reach, device=positions.device)
        return cls(lanes.long(), positions, places, places <= positions[:, None], call)

    def rows(self, cache: Tensor) -> Tensor:
        """cache [lanes, capacity, D] -> [N, S, D]; what a lane does not hold is 0."""
        held = cache[:, : len(self.places)].index_select(0, self.lanes)
        return held.masked_fill_(~self.seen[..., None], 0.0)

    def heads(self, cache: Tensor) -> Tensor:
        """cache [lanes, kv heads, capacity, D] -> [N, kv heads, S, D], as `rows`."""
        held = cache[:, :, : len(self.places)].index_select(0, self.lanes)
        return held.masked_fill_(~self.seen[:, None, :, None], 0.0)


def put(cache: Tensor, rows: Tensor, static: Static) -> None:
    """Write rows [N, D] to where their tokens stand in a cache [lanes, capacity, D]."""
    cache.index_put_((static.lanes, static.positions), rows)


# --- latent attention -----------------------------------------------------------------------------


def latent_attention(run: TorchMLA, h: Tensor, static: Static) -> Tensor:
    """h [N, H] -> [N, H]: queries are taken to the space of the latent rows."""
    s = run.spec
    latent, q, gate, new = run.projected(h, static.call)
    if run.indexer is not None:
        assert latent is not None
        static.chosen = indexed(run.indexer, h, latent, static)
    put(run.cache, new, static)
    rows, seen = static.rows(run.cache), static.seen
    if static.chosen is not None and (run.indexer is not None or s.shares_choice):
        seen = seen & static.chosen
    still, moving = split(q, s.nope_dim, s.rope_dim)  # [N, heads, ..]
    inner = torch.bmm(still.transpose(0, 1), run.to_keys).transpose(0, 1)
    scores = torch.cat((inner, moving), -1) @ rows.transpose(1, 2) * s.scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    mixed = shares @ rows[..., : s.kv_lora_rank]  # [N, heads, latent]
    out = torch.bmm(mixed.transpose(0, 1), run.to_values.transpose(1, 2)).transpose(0, 1)
    return run.finish(out, gate)


def indexed(run: TorchIndexer, h: Tensor, latent: Tensor, static: Static) -> Tensor:
    """Which positions each lane's token sees [N, S]: all, where there are no more than `topk`."""
    s, call = run.spec, static.call
    k, q = run.keys(h, call), run.queries(latent, call)
    put(run.cache, k, static)
    seen = static.seen
    if seen.shape[1] <= s.topk:
        return seen
    sums = run.scores(q, run.head_weights(h), static.rows(run.cache))
    best = sums.masked_fill(~seen, -torch.inf).topk(s.topk, -1).indices
    return torch.zeros_like(seen).scatter_(1, best, True) & seen


# --- attention over keys and values ---------------------------------------------------------------


def attended(run: CachedAttention, qk: Tensor, v: Tensor, static: Static) -> Tensor:
    """As `CachedAttention.attend`, without sinks and softcap: qk [N, heads + kv heads, D] and v
    [N, kv heads, Dv], which are cached -> [N, heads × Dv]."""
    s, N = run.spec, len(v)
    heads = qk.shape[1] - s.kv_heads
    at = static.lanes[:, None], torch.arange(s.kv_heads, device=v.device), static.positions[:, None]
    run.keys.index_put_(at, qk[:, heads:])
    run.values.index_put_(at, v)
    seen = static.seen
    if s.window:
        seen = seen & (static.places > static.positions[:, None] - s.window)
    q = qk[:, :heads].reshape(N, s.kv_heads, -1, s.head_dim)
    keys, values = static.heads(run.keys), static.heads(run.values)
    mixed = F.scaled_dot_product_attention(q, keys, values, seen[:, None, None], scale=s.scale)
    return mixed.reshape(N, -1)


def convolved_attention(run: TorchConvolvedAttention, h: Tensor, static: Static) -> Tensor:
    """Attention whose queries and keys pass two convolutions over the last tokens."""
    s, N = run.spec, len(h)
    qkv = linear(h, run.qkv, run.qkv_bias)
    qk, now, after = split(qkv, run.wide, run.half, run.half)
    window = run.window.index_select(0, static.lanes)
    window = torch.cat((window, torch.cat((qk, after), -1)[..., None]), -1)
    run.window.index_copy_(0, static.lanes, window[..., 1:])
    before = window[:, run.wide :, -2]
    if run.qkv_bias is not None:  # before the first token there is a bias
        first = static.positions[:, None] == 0
        before = torch.where(first, run.qkv_bias[-run.half :], before)
    (channels, shift), (heads, other) = run.convolutions
    x = convolution(window[:, : run.wide, -1 - run.taps :], channels[:, None], shift, run.wide)
    x = convolution(x, heads, other, run.wide // s.head_dim)[..., 0]
    qk = run.placed(x, qk, static.call)
    v = torch.cat((now, before), -1).view(N, s.kv_heads, s.head_dim)
    return linear(attended(run, qk, v, static), *run.out)


# --- attention whose queries are experts ----------------------------------------------------------


def routed_attention(
    run: TorchRoutedAttention,
    queries: Tensor,
    out: Tensor,
    h: Tensor,
    ids: Tensor,
    weights: Tensor,
    static: Static,
) -> Tensor:
    """h [N, H] -> [N, H] through the experts queries [E, kv heads × D, H] and out [E, H, ..] that
    ids [N, K] name (-1: none), those of a lane gathered."""
    s, (N, K) = run.spec, ids.shape
    places = ids.clamp(min=0).long().flatten()
    weights = weights.masked_fill(ids < 0, 0.0).to(run.combine)
    keys, values = linear(h, run.kv).chunk(2, -1)
    q = queries.index_select(0, places).view(N, K, -1, h.shape[1]) @ h[:, None, :, None]
    q = q.view(N, K, s.kv_heads, s.head_dim).transpose(1, 2)
    qk = torch.cat((q.flatten(1), keys), -1).view(N, -1, s.head_dim)
    if s.rope is not None:
        qk = rotate(qk, s.rope, static.call.rotations[id(s.rope)])
    mixed = attended(run, qk, values.view(N, s.kv_heads, s.head_dim), static)
    mixed = mixed.view(N, s.kv_heads, K, s.head_dim).transpose(1, 2).reshape(N, K, -1, 1)
    parts = (out.index_select(0, places).view(N, K, h.shape[1], -1) @ mixed)[..., 0]
    y = (parts * weights[..., None]).to(h.dtype).sum(1)
    return y if run.output_bias is None else y + run.output_bias


# --- state that is rewritten ----------------------------------------------------------------------


def convolved(
    run: Recurrent,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lanes: Tensor,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One more input [N, channels] of the convolution of each lane, as `Recurrent.convolve`."""
    window = torch.cat((run.window.index_select(0, lanes), x[..., None]), -1)
    run.window.index_copy_(0, lanes, window[..., 1:])
    out = (window.float() * weight.float()).sum(-1)
    out = (out if bias is None else out + bias.float()).to(x.dtype)
    return out if activation is None else activation(out)


def linear_attention(run: Delta, h: Tensor, static: Static) -> Tensor:
    """The gated delta rule, with a decay a head or a channel."""
    qkv, g, strength, gate = run.inputs(h)
    q, k, v = run.heads(convolved(run, qkv, run.conv, None, static.lanes, F.silu))
    decay = g.float().exp()[..., None]
    state = run.matrix.index_select(0, static.lanes)  # [N, heads, Dk, Dv]
    state = state * (decay if g.ndim == 3 else decay[..., None])
    change = (v - (state * k[..., None]).sum(-2)) * strength.float()[..., None]
    state = state + k[..., None] * change[..., None, :]
    run.matrix.index_copy_(0, static.lanes, state)
    out = (state * q[..., None]).sum(-2)
    return run.finish(out.to(qkv.dtype), gate)


def state_space_2(run: Mamba2, h: Tensor, static: Static) -> Tensor:
    """One decay a head."""
    gate, xbc, dt = run.inputs(h)
    xbc = convolved(run, xbc, run.conv, run.conv_bias, static.lanes, F.silu)
    x, b, c = run.selected(xbc.float())
    state = run.matrix.index_select(0, static.lanes)  # [N, heads, D, state]
    state = state * (dt * run.rate).exp()[..., None, None]
    state = state + (x * dt[..., None])[..., None] * b[:, :, None]
    run.matrix.index_copy_(0, static.lanes, state)
    out = (state * c[:, :, None]).sum(-1) + run.skip[:, None] * x
    return run.finish(out.flatten(1), gate)


def state_space_1(run: Mamba1, h: Tensor, static: Static) -> Tensor:
    """A decay for every channel and state."""
    x, gate = linear(h, run.inner, run.inner_bias).chunk(2, -1)
    x = convolved(run, x, run.conv, run.conv_bias, static.lanes, F.silu)
    dt, b, c = run.selected(x)
    x = x.float()
    state = run.matrix.index_select(0, static.lanes)  # [N, inner, state]
    state = torch.exp(dt[..., None] * run.rate) * state + (dt * x)[..., None] * b[:, None]
    run.matrix.index_copy_(0, static.lanes, state)
    out = (state @ c[..., None])[..., 0] + run.skip * x
    mixed = (out * F.silu(gate.float())).to(h.dtype)
    return linear(mixed, run.out, run.out_bias)


def short_convolution(run: TorchShortConv, h: Tensor, static: Static) -> Tensor:
    b, c, x = linear(h, run.inner, run.biases[0]).chunk(3, -1)
    mixed = convolved(run, b * x, run.conv, run.biases[1], static.lanes)
    return linear(c * mixed, run.out, run.biases[2])


# the class of a running torch operator -> its form here
FORMS: tuple[tuple[type, Callable[[Any, Tensor, Static], Tensor]], ...] = (
    (TorchMLA, latent_attention),
    (Delta, linear_attention),
    (Mamba2, state_space_2),
    (Mamba1, state_space_1),
    (TorchConvolvedAttention, convolved_attention),
    (TorchShortConv, short_convolution),
)
