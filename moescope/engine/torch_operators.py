"""The operators of `DecoderSpec` on torch tensors, one small class each, built once per layer.

Rounding points are those of transformers' eager code, so that bfloat16 runs agree closely. Letters:
R rows (lanes × tokens), N lanes, T tokens of each, H hidden, I expert width, E experts, K picked,
G query heads per key head, D head width, S keys in sight. Lanes, caches and records are
`torch_decoder`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.decoder import MLP, Attention, MoE, Norm, Rope
from moescope.kernels import native_experts
from moescope.kernels.spec import RouterSpec, Routing
from moescope.kernels.torch_ops import route_torch

Weights = Mapping[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu}
TILE = 8
QUERY_BLOCK = 512
Groups = list[tuple[RouterSpec, Tensor | None]]  # which rows (None: all) a router spec is for


@dataclass(slots=True)
class Call:
    """One call of the decoder: N lanes of T tokens, `lanes[n]` from position `starts[n]` on."""

    lanes: tuple[int, ...]
    starts: tuple[int, ...]
    tokens: int
    token_ids: Tensor  # [R]
    groups: list[Groups]  # per router
    shadows: tuple[tuple[RouterSpec, ...], ...]  # per shadow variant, one spec per router
    keep_logits: bool
    routings: list[Routing]  # filled router by router, and per router the shadows'
    shadow_routings: list[list[Routing]]
    rotations: dict[int, tuple[Tensor, Tensor]]  # by the id of a rope: cos, signed sin [R, 1, D]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, in] times weight [out, in].

    On a CPU, one float32 row is a matrix-vector product, and so is one bfloat16 row where there are
    tiles for it: there `mv` reads memory a fifth faster. Few float32 rows are padded to a whole
    tile, because the product rounds rows of a cut tile in other ways: lanes that do the same must
    get the same bits, wherever they stand in the batch.
    """
    rows = x.shape[0]
    if x.device.type == "cpu":
        if rows == 1 and bias is None and _prefers_mv(x.dtype):
            return torch.mv(weight, x[0]).unsqueeze(0)
        if 1 < rows < TILE and x.dtype is not torch.bfloat16:
            return F.linear(F.pad(x, (0, 0, 0, TILE - rows)), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def _prefers_mv(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and _has_tiles())


@cache
def _has_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 tiles (AMX)."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask()) if ask is not None else False


def make_norm(norm: Norm, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """RMS norm over the last dimension. transformers rounds before it multiplies (`model`), but for
    the families that multiply in float32."""
    shape, eps = (norm.width,), norm.eps
    if norm.applies == "float32":
        return lambda x: F.rms_norm(x, shape, weight, eps)
    return lambda x: weight * F.rms_norm(x, shape, None, eps)


def rotary_table(rope: Rope, positions: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and signed sin [positions, dims] in float32; the sign is that of the rotated half."""
    inverse, factor = _frequencies(rope)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def _frequencies(rope: Rope) -> tuple[Tensor, float]:
    """Inverse frequencies [dims / 2] and what multiplies cos and sin (YaRN: arXiv 2309.00071)."""
    powers = rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims)
    plain, scaling = 1.0 / powers, rope.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0

    def correction(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return (rope.dims * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = correction(scaling.beta_fast), correction(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = (high - low) or 0.001
    ramp = torch.clamp((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / width, 0, 1)
    keeps = 1 - ramp
    stretched = 1.0 / (scaling.factor * powers)
    return stretched * (1 - keeps) + plain * keeps, scaling.attention_factor


class TorchAttention:
    """Grouped attention over a cache [2, lanes, kv heads, capacity, D] that `open` allocates."""

    def __init__(self, spec: Attention, weights: Weights, path: str, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.qkv, self.qkv_bias = weights[f"{path}.qkv.weight"], weights.get(f"{path}.qkv.bias")
        self.out, self.out_bias = (
            weights[f"{path}.o_proj.weight"],
            weights.get(f"{path}.o_proj.bias"),
        )
        self.norms = self._norms(weights, path)
        self.cache = torch.empty(0)

    def _norms(self, weights: Weights, path: str) -> Callable[[Tensor], Tensor]:
        """Normalises q and k, side by side in the columns of qk [R, (heads + kv heads) × D]."""
        s = self.spec
        if s.qk_norm is None:
            return lambda qk: qk
        q_weight, k_weight = weights[f"{path}.q_norm.weight"], weights[f"{path}.k_norm.weight"]
        q_norm = make_norm(s.qk_norm, q_weight)
        k_norm = make_norm(s.kv_norm or s.qk_norm, k_weight)
        if s.qk_norm_over == "flat":
            split = s.heads * s.head_dim
            return lambda qk: torch.cat((q_norm(qk[:, :split]), k_norm(qk[:, split:])), -1)
        every = torch.cat((q_weight.expand(s.heads, -1), k_weight.expand(s.kv_heads, -1)))
        shape, eps = (s.head_dim,), s.qk_norm.eps
        return lambda qk: every * F.rms_norm(qk.reshape(len(qk), -1, s.head_dim), shape, None, eps)

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Allocate the cache, keeping what it holds."""
        old, s = self.cache, self.spec
        shape = (2, lanes, s.kv_heads, capacity, s.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=device)
        if old.numel():
            self.cache[:, : old.shape[1], :, : old.shape[3]] = old

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache[:, target, :, :length] = self.cache[:, source, :, :length]

    def __call__(self, h: Tensor, call: Call) -> Tensor:
        s = self.spec
        qkv = linear(h, self.qkv, self.qkv_bias)  # [R, (heads + 2 kv heads) × D]
        split = (s.heads + s.kv_heads) * s.head_dim
        qk, v = self.norms(qkv[:, :split]), qkv[:, split:]
        if s.clip_qkv is not None:
            qk, v = qk.clamp(-s.clip_qkv, s.clip_qkv), v.clamp(-s.clip_qkv, s.clip_qkv)
        qk = qk.reshape(len(h), s.heads + s.kv_heads, s.head_dim)
        if s.rope is not None:
            cos, sin = call.rotations[id(s.rope)]
            turned = torch.roll(qk, s.head_dim // 2, -1)
            qk = (qk * cos + turned * sin).to(h.dtype)
        v = v.reshape(len(h), s.kv_heads, s.head_dim)
        attend = self._one if call.tokens == 1 else self._many
        rows = [
            attend(lane, start, qk[n : n + call.tokens], v[n : n + call.tokens])
            for lane, start, n in zip(
                call.lanes, call.starts, range(0, len(h), call.tokens), strict=True
            )
        ]
        mixed = rows[0] if len(rows) == 1 else torch.cat(rows)
        return linear(mixed, self.out, self.out_bias)

    def _one(self, lane: int, start: int, qk: Tensor, v: Tensor) -> Tensor:
        """One token of one lane: the G query heads of a key head stand as rows, so nothing is
        repeated and, all keys being in sight, nothing is masked."""
        s, end = self.spec, start + 1
        keys, values = self.cache[0, lane], self.cache[1, lane]
        keys[:, start], values[:, start] = qk[0, s.heads :], v[0]
        first = max(0, end - s.window) if s.window else 0
        q = qk[0, : s.heads].view(1, s.kv_heads, -1, s.head_dim)
        out = F.scaled_dot_product_attention(
            q, keys[None, :, first:end], values[None, :, first:end], scale=s.scale
        )
        return out.reshape(1, -1)

    def _many(self, lane: int, start: int, qk: Tensor, v: Tensor) -> Tensor:
        """T tokens of one lane, after `start` cached ones."""
        s, tokens = self.spec, len(v)
        end = start + tokens
        self.cache[0, lane, :, start:end] = qk[:, s.heads :].transpose(0, 1)
        self.cache[1, lane, :, start:end] = v.transpose(0, 1)
        first = max(0, start - s.window + 1) if s.window else 0
        keys, values = self.cache[:, lane, :, first:end].repeat_interleave(
            s.heads // s.kv_heads, 1
        )  # each [heads, S, D]
        q = qk[:, : s.heads].transpose(0, 1)
        if start == 0 and (not s.window or tokens <= s.window):
            out = F.scaled_dot_product_attention(
                q[None], keys[None], values[None], is_causal=True, scale=s.scale
            )[0]
        else:
            out = self._masked(q, keys, values, start, first)
        return out.transpose(0, 1).reshape(tokens, -1)

    def _masked(self, q: Tensor, keys: Tensor, values: Tensor, start: int, first: int) -> Tensor:
        """Queries from position `start`, keys from `first`: in blocks, so that masks stay small."""
        s, blocks = self.spec, []
        for at in range(0, q.shape[1], QUERY_BLOCK):
            block = q[:, at : at + QUERY_BLOCK]
            begin = start + at
            end = begin + block.shape[1]
            low = max(first, begin - s.window + 1) if s.window else first
            query = torch.arange(begin, end, device=q.device)[:, None]
            key = torch.arange(low, end, device=q.device)[None]
            mask = key <= query
            if s.window:
                mask &= key > query - s.window
            seen = slice(low - first, end - first)
            blocks.append(
                F.scaled_dot_product_attention(
                    block[None], keys[None, :, seen], values[None, :, seen], mask, scale=s.scale
                )[0]
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


class TorchMLP:
    """A gated dense block."""

    def __init__(self, spec: MLP, weights: Weights, path: str) -> None:
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_up = weights[f"{path}gate_up.weight"]
        self.down = weights[f"{path}down_proj.weight"]

    def __call__(self, h: Tensor) -> Tensor:
        gate, up = linear(h, self.gate_up).chunk(2, -1)
        return linear(self.activation(gate) * up, self.down)


class TorchMoE:
    """A router, its experts, and a shared expert beside them."""

    def __init__(self, spec: MoE, weights: Weights, path: str, index: int) -> None:
        self.spec, self.index = spec, index
        self.gate = weights[f"{path}.gate.weight"]
        self.rounded_gates: dict[int, Tensor] = {}
        self.experts = TorchExperts(spec, weights, f"{path}.experts")
        self.shared: TorchMLP | None = None
        self.shared_gate = weights.get(f"{path}.shared_expert_gate.weight")
        if spec.shared is not None:
            self.shared = TorchMLP(spec.shared, weights, f"{path}.shared_expert.")

    def __call__(self, h: Tensor, read: Tensor, call: Call) -> Tensor:
        seen = read if self.spec.router.wiring.router_input == "residual" else h
        groups = call.groups[self.index]
        routing = (
            self._route(seen, groups[0][0], call)
            if len(groups) == 1
            else self._route_groups(seen, groups, call)
        )
        call.routings.append(routing)
        if call.shadows:
            variants = [self._route(seen, specs[self.index], call) for specs in call.shadows]
            call.shadow_routings.append(variants)
        out = self.experts(h, routing.expert_ids, routing.weights)
        for spec, rows in groups:
            if spec.output_scale != 1.0:
                out[slice(None) if rows is None else rows] *= spec.output_scale
        if self.shared is None:
            return out
        extra = self.shared(h)
        if self.shared_gate is not None:
            extra = torch.sigmoid(linear(h, self.shared_gate)) * extra
        return out + extra

    def _route(self, seen: Tensor, spec: RouterSpec, call: Call) -> Routing:
        dtype = DTYPES[spec.wiring.router_dtype]
        gate = self._gate(spec.policy.gate_quant_bits).to(dtype)
        return route_torch(linear(seen.to(dtype), gate), spec, keep_logits=call.keep_logits)

    def _gate(self, bits: int) -> Tensor:
        """The gate's weight, or a copy rounded to `bits`."""
        if bits == 0:
            return self.gate
        if bits not in self.rounded_gates:
            self.rounded_gates[bits] = rounded_gate(self.gate, bits)
        return self.rounded_gates[bits]

    def _route_groups(self, seen: Tensor, groups: Groups, call: Call) -> Routing:
        """Lanes under different policies: one routing per policy, put together again by rows."""
        R, E = len(seen), groups[0][0].E
        K = max(spec.K for spec, _ in groups)
        whole = _empty_routing(R, K, E, seen.device, call.keep_logits)
        for spec, rows in groups:
            assert rows is not None
            part = self._route(seen[rows], spec, call)
            for name in ("expert_ids", "scores", "weights"):
                getattr(whole, name)[rows, : spec.K] = getattr(part, name)
            for name in ("score_sum", "mass", "entropy", "margin", "runner_up"):
                getattr(whole, name)[rows] = getattr(part, name)
            if call.keep_logits:
                whole.logits[rows] = part.logits
        return whole


def rounded_gate(gate: Tensor, bits: int) -> Tensor:
    """A gate's weight [E, H] rounded to `bits`, symmetric about 0 in each row."""
    wide = gate.double()
    step = wide.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, torch.round(wide / step) * step, 0.0).to(gate.dtype)


def grouped_products(
    spec: MoE, gate_up: Tensor, down: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """(h [R, H], ids [R, K], weights [R, K]) -> [R, H] in a few launches, where there is a kernel:
    in Triton on CUDA, in C for bfloat16 on a CPU that multiplies it."""
    wiring = spec.router.wiring
    first = wiring.apply_router_weight_on_input
    if gate_up.is_cuda and find_spec("triton") is not None:
        from moescope.kernels.triton_ops.grouped import experts_grouped

        activation, combine = spec.experts.activation, DTYPES[wiring.combine_dtype]
        return lambda h, ids, weights: experts_grouped(
            *(h.contiguous(), gate_up, down, ids, weights),
            activation=activation,
            weight_on_input=first,
            combine_dtype=combine,
        )
    if spec.experts.activation == "silu" and native_experts.covers(gate_up, down):
        return lambda h, ids, weights: native_experts.experts(
            h, gate_up, down, ids, weights, weight_on_input=first
        )
    return None


class TorchExperts:
    """Reads each chosen expert's weights once, for all rows that chose it; gathers no copies."""

    def __init__(self, spec: MoE, weights: Weights, path: str) -> None:
        self.wiring = spec.router.wiring
        self.activation = ACTIVATIONS[spec.experts.activation]
        gate_up, down = weights[f"{path}.gate_up"], weights[f"{path}.down"]
        self.gate_up = gate_up.unbind(0)  # E of [2I, H]
        self.down = down.unbind(0)  # E of [H, I]
        self.combine = DTYPES[self.wiring.combine_dtype]
        self.grouped = grouped_products(spec, gate_up, down)

    def __call__(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """h [R, H], ids [R, K] with -1 unused, weights [R, K] -> [R, H]."""
        if self.grouped is not None:
            return self.grouped(h, ids, weights)
        weights = weights.to(self.combine)
        if h.shape[0] == 1 and not self.wiring.apply_router_weight_on_input:
            return self._one(h, ids[0].tolist(), weights[0])
        return self._many(h, ids, weights)

    def _one(self, h: Tensor, ids: list[int], weights: Tensor) -> Tensor:
        """One row: products per expert, everything else on all K at once. Ascending ids, as
        transformers adds them up."""
        chosen = [(e, k) for e, k in sorted(zip(ids, range(len(ids)), strict=True)) if e >= 0]
        real = [(e, k) for e, k in chosen if e < len(self.down)]
        if not real:
            return torch.zeros_like(h)
        both = torch.cat([linear(h, self.gate_up[e]) for e, _ in real])
        gate, up = both.chunk(2, -1)
        inner = self.activation(gate) * up
        parts = torch.cat([linear(inner[i : i + 1], self.down[e]) for i, (e, _) in enumerate(real)])
        scaled = (parts * weights[[k for _, k in real], None]).to(h.dtype)
        out = scaled[:1]
        for i in range(1, len(real)):
            out = out + scaled[i : i + 1]
        return out

    def _many(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Rows sorted by expert, each expert's in one product; a row's parts are then added up in
        the order of experts."""
        R, K = ids.shape
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
        scale = weights.reshape(-1)[order, None]
        x = h[order // K]
        if self.wiring.apply_router_weight_on_input:
            x, scale = (x * scale).to(h.dtype), torch.ones_like(scale)
        spans = list(zip(chosen.tolist(), torch.split(x, counts.tolist()), strict=True))
        real = [(e, part) for e, part in spans if 0 <= e < len(self.down)]
        if not real:
            return torch.zeros_like(h)
        both = torch.cat([linear(part, self.gate_up[e]) for e, part in real])
        gate, up = both.chunk(2, -1)
        inner = torch.split(self.activation(gate) * up, [len(part) for _, part in real])
        downs = [linear(part, self.down[e]) for (e, _), part in zip(real, inner, strict=True)]
        unused = sum(len(part) for e, part in spans if e < 0)
        null = len(x) - unused - sum(map(len, downs))
        parts = torch.cat([h.new_zeros(unused, h.shape[1]), *downs, h.new_zeros(null, h.shape[1])])
        parts = (parts * scale).to(h.dtype)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(R * K, device=h.device))
        places = places.view(R, K).sort(1).values
        out = parts[places[:, 0]]
        for k in range(1, K):
            out = out + parts[places[:, k]]
        return out


def _empty_routing(R: int, K: int, E: int, device: torch.device, logits: bool) -> Routing:
    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device)

    nan = float("nan")
    return Routing(
        expert_ids=torch.full((R, K), -1, dtype=torch.int32, device=device),
        scores=full(0.0, R, K),
        weights=full(0.0, R, K),
        score_sum=full(nan, R),
        mass=full(nan, R),
        entropy=full(nan, R),
        margin=full(nan, R),
        runner_up=torch.full((R,), -1, dtype=torch.int32, device=device),
        logits=full(nan, R, E) if logits else None,
    )
