"""The torch interpreter of `DecoderSpec`: CPU, and CUDA without graphs.

It owns lanes (their lengths, policies and cache rows), runs the layers' branches, and collects what
every router decided. The operators are in `torch_operators.py`. It never asks for a model type:
what a spec asks for and is not in here is refused by the name of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moescope.engine import torch_operators as ops
from moescope.engine.decoder import (
    MLP,
    RESIDUAL,
    Attention,
    Branch,
    DecoderSpec,
    MoE,
    Norm,
    state_bytes,
)
from moescope.engine.interpreter import Router, StepOutput
from moescope.engine.torch_limits import refuse_unsupported
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec
from moescope.trace.frames import RecordLevel

K_LIMIT = 32
Step = tuple[Callable[[Tensor], Tensor] | None, Any, Callable[[Tensor], Tensor] | None, Branch]


class TorchDecoder:
    """A loaded model; see `interpreter.Interpreter`. `weights` are the tensors of
    `parameters.slots(spec)` by name, on `device` and in `dtype`."""

    def __init__(
        self, spec: DecoderSpec, weights: Mapping[str, Tensor], *, device: str, dtype: str
    ) -> None:
        refuse_unsupported(spec)
        self.spec, self.device, self.dtype = spec, device, dtype
        self.vocab_size = spec.vocab_size
        self.routers = tuple(
            Router(layer, router.resolved(dtype), {}) for layer, _, router in spec.routers()
        )
        self.kernels = {"attention": "torch sdpa", "router": "torch", "experts": "torch"}
        self._embed = weights["embed.weight"]
        self._head = weights["embed.weight" if spec.tied_head else "head.weight"]
        self._final = _norm(spec.final_norm, weights, "final_norm")
        self._layers = self._build(weights)
        self._attentions = [
            step[1] for steps in self._layers for step in steps if _keeps_state(step[1])
        ]
        self._ropes = {
            id(a.spec.rope): a.spec.rope for a in self._attentions if a.spec.rope is not None
        }
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: list[int] = []
        self._capacity = 0
        self._interned: dict[RouterSpec, RouterSpec] = {}
        self._specs: list[tuple[RouterSpec, ...]] = []  # per lane, one per router
        self._groups: dict[tuple[tuple[int, ...], int], list[ops.Groups]] = {}

    def _build(self, weights: Mapping[str, Tensor]) -> list[list[Step]]:
        dtype = ops.DTYPES[self.dtype]
        index = 0
        layers: list[list[Step]] = []
        for number, layer in enumerate(self.spec.layers):
            steps: list[Step] = []
            for branch in layer.branches:
                path = f"layers.{number}.{branch.name}"
                run: Any
                match branch.operator:
                    case Attention() as attention:
                        run = ops.TorchAttention(attention, weights, path, dtype)
                    case MLP() as mlp:
                        run = ops.TorchMLP(mlp, weights, f"{path}.")
                    case MoE() as moe:
                        moe = replace(moe, router=self.routers[index].spec)
                        run = ops.TorchMoE(moe, weights, path, index)
                        index += 1
                    case other:
                        raise AssertionError(f"{type(other).__name__} should have been refused")
                pre = _norm(branch.pre_norm, weights, f"{path}.pre_norm")
                post = _norm(branch.post_norm, weights, f"{path}.post_norm")
                steps.append((pre, run, post, branch))
            layers.append(steps)
        return layers

    # --- lanes ------------------------------------------------------------------------------

    def open(self, lanes: int, capacity: int) -> None:
        """Allocate, or re-allocate and lose nothing, for `lanes` lanes of `capacity` tokens."""
        lanes, capacity = max(lanes, len(self._lengths)), max(capacity, self._capacity)
        if lanes == len(self._lengths) and capacity == self._capacity:
            return
        with torch.inference_mode():
            try:
                for attention in self._attentions:
                    attention.open(lanes, capacity, self.device)
            except (RuntimeError, MemoryError) as error:
                size = self.cache_bytes(lanes, capacity) / 1e9
                raise MoescopeError(
                    f"no memory for a cache of {size:.1f} GB ({lanes} lanes of {capacity} tokens)",
                    hint="fewer lanes or a shorter context",
                    code=ExitCode.RESOURCES,
                ) from error
            if capacity > self._capacity:
                for key, rope in self._ropes.items():
                    table = ops.rotary_table(rope, capacity, self.device)
                    dtype = torch.float32 if rope.applies == "float32" else ops.DTYPES[self.dtype]
                    cos, sin = (part.to(dtype).unsqueeze(1) for part in table)
                    self._rotations[key] = cos, sin
        self._capacity = capacity
        trained = tuple(self._intern(router.spec) for router in self.routers)
        for _ in range(lanes - len(self._lengths)):
            self._lengths.append(0)
            self._specs.append(trained)

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        """From the next call on, `lane` routes under these, one per router."""
        assert len(policies) == len(self.routers), "one policy per router"
        specs = []
        for router, policy in zip(self.routers, policies, strict=True):
            limit = max(router.spec.K, min(router.spec.E, K_LIMIT))
            if policy.num_experts_per_tok > limit:
                raise MoescopeError(
                    f"num_experts_per_tok: expected 1..{limit}, found {policy.num_experts_per_tok}"
                )
            if policy.correction_bias != "none" or policy.per_expert_scale:
                raise MoescopeError(
                    "correction_bias, per_expert_scale: this model has no tensor for them"
                )
            spec = RouterSpec(policy, router.spec.wiring).resolved(self.dtype)
            specs.append(self._intern(spec))
        self._specs[lane] = tuple(specs)
        self._groups.clear()

    def _intern(self, spec: RouterSpec) -> RouterSpec:
        """One object per spec, so that lanes are grouped by identity."""
        return self._interned.setdefault(spec, spec)

    def length(self, lane: int) -> int:
        """Tokens the lane holds."""
        return self._lengths[lane]

    def truncate(self, lane: int, length: int) -> None:
        """Forget everything from `length` on."""
        assert 0 <= length <= self._lengths[lane]
        self._lengths[lane] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""
        assert 0 <= length <= self._lengths[source]
        if source != target:
            with torch.inference_mode():
                for attention in self._attentions:
                    attention.copy(source, target, length)
        self._lengths[target] = length

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        """Bytes of state `open` would allocate."""
        return lanes * state_bytes(self.spec, capacity, ops.DTYPES[self.dtype].itemsize)

    # --- running ----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
    ) -> StepOutput:
        """Feed T tokens to each of N lanes (token_ids [N, T]) after what they already hold.

        Raises MoescopeError for an id outside the vocabulary and for a lane that is full; the lanes
        are then as they were.
        """
        lanes, ids = tuple(lanes), np.ascontiguousarray(token_ids, dtype=np.int64)
        self._check(lanes, ids)
        if ids.shape[1] == 1 or len(lanes) == 1:
            return self._run(lanes, ids, all_logits, record)
        # A prompt lane by lane: what a lane computes must not depend on who is beside it.
        outs = [
            self._run((lane,), ids[n : n + 1], all_logits, record) for n, lane in enumerate(lanes)
        ]
        return _merge(outs)

    def _run(
        self, lanes: tuple[int, ...], ids: NDArray[np.int64], all_logits: bool, record: RecordLevel
    ) -> StepOutput:
        call = self._prepare(lanes, ids, keep_logits=record == "logits")
        x = F.embedding(call.token_ids, self._embed)  # [R, H]
        for steps in self._layers:
            x = _run_layer(steps, x, call)
        x = x.view(len(lanes), call.tokens, -1)
        if not all_logits:
            x = x[:, -1:]
        shape = x.shape[:2]
        x = x.flatten(0, 1)
        logits = ops.linear(self._final(x) if self._final else x, self._head).view(*shape, -1)
        for lane in lanes:
            self._lengths[lane] += call.tokens
        return _collect(call, logits, record)

    def _check(self, lanes: tuple[int, ...], ids: NDArray[np.int64]) -> None:
        """Ids are known and there is room, in every lane."""
        assert ids.ndim == 2 and ids.shape[0] == len(lanes) > 0 < ids.shape[1]
        assert len(set(lanes)) == len(lanes), "each lane once"
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            raise MoescopeError(
                f"token id {int(ids[outside][0])}: expected 0..{self.vocab_size - 1}"
            )
        needed = max(self._lengths[lane] for lane in lanes) + ids.shape[1]
        if needed > self._capacity:
            raise MoescopeError(
                f"a lane holds at most {self._capacity} tokens, {needed} are needed",
                code=ExitCode.RESOURCES,
            )

    def _prepare(
        self, lanes: tuple[int, ...], ids: NDArray[np.int64], *, keep_logits: bool
    ) -> ops.Call:
        """What the operators of one call share."""
        tokens = ids.shape[1]
        starts = tuple(self._lengths[lane] for lane in lanes)
        at = np.concatenate([np.arange(start, start + tokens) for start in starts])
        positions = torch.from_numpy(at).to(self.device)
        call = ops.Call(
            lanes,
            starts,
            tokens,
            torch.from_numpy(ids).flatten().to(self.device),
            positions,
            self._grouped(lanes, tokens),
            keep_logits,
        )
        for key, (cos, sin) in self._rotations.items():
            call.rotations[key] = cos[positions], sin[positions]
        return call

    def _grouped(self, lanes: tuple[int, ...], tokens: int) -> list[ops.Groups]:
        """Per router, the rows of lanes that route under the same spec."""
        if (found := self._groups.get((lanes, tokens))) is not None:
            return found
        every: list[ops.Groups] = []
        for index in range(len(self.routers)):
            rows: dict[int, list[int]] = {}
            specs: dict[int, RouterSpec] = {}
            for n, lane in enumerate(lanes):
                spec = self._specs[lane][index]
                specs[id(spec)] = spec
                rows.setdefault(id(spec), []).extend(range(n * tokens, (n + 1) * tokens))
            if len(specs) == 1:
                every.append([(next(iter(specs.values())), None)])
            else:
                every.append([(specs[k], torch.tensor(rows[k], device=self.device)) for k in specs])
        if len(self._groups) > 64:
            self._groups.clear()
        self._groups[lanes, tokens] = every
        return every


def _run_layer(steps: list[Step], x: Tensor, call: ops.Call) -> Tensor:
    taps = {RESIDUAL: x}
    for pre, run, post, branch in steps:
        read = taps[branch.reads]
        h = read if pre is None else pre(read)
        if isinstance(run, ops.TorchMoE):
            y = run(h, read, call)
        elif isinstance(run, ops.TorchAttention):
            y = run(h, call)
        else:
            y = run(h)
        if post is not None:
            y = post(y)
        if branch.multiplier != 1.0:
            y = y * branch.multiplier
        held = taps.get(branch.adds_to)
        taps[branch.adds_to] = y if held is None else held + y
    return taps[RESIDUAL]


def _collect(call: ops.Call, logits: Tensor, record: RecordLevel) -> StepOutput:
    """What the routers decided, as numpy [N, T, L, ...]."""
    shape = (len(call.lanes), call.tokens)

    def stacked(name: str, dtype: Any) -> NDArray[Any]:
        parts = _aligned([getattr(routing, name) for routing in call.routings], name)
        whole = torch.stack(parts, 1).cpu().numpy()  # [R, L, ...]
        return whole.reshape(*shape, *whole.shape[1:]).astype(dtype, copy=False)

    ids = stacked("expert_ids", np.int16)
    invalid = (ids[..., 0] < 0).any(axis=(0, 1))
    wanted = record != "ids"
    return StepOutput(
        logits=logits.float().cpu().numpy(),
        expert_ids=ids,
        **{name: stacked(name, np.float32) for name in ("score_sum", "mass", "entropy", "margin")},
        runner_up=stacked("runner_up", np.int16),
        weights=stacked("weights", np.float32) if wanted else None,
        scores=stacked("scores", np.float32) if wanted else None,
        router_logits=stacked("logits", np.float32) if record == "logits" else None,
        invalid_router=int(invalid.argmax()) if invalid.any() else None,
    )


_FILLS: dict[str, float] = {"expert_ids": -1, "logits": float("nan")}


def _aligned(parts: list[Tensor], name: str) -> list[Tensor]:
    """Routers may differ in K and E: pad the last dimension to the largest."""
    if parts[0].ndim == 1:
        return parts
    widest = max(part.shape[-1] for part in parts)
    fill = _FILLS.get(name, 0.0)
    return [
        part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]), value=fill)
        for part in parts
    ]


def _merge(outs: list[StepOutput]) -> StepOutput:
    """Outputs of single lanes as one; lanes may differ in K."""
    K = max(out.expert_ids.shape[-1] for out in outs)

    def joined(name: str) -> NDArray[Any] | None:
        parts = [getattr(out, name) for out in outs]
        if parts[0] is None:
            return None
        if name in ("expert_ids", "weights", "scores"):
            fill = -1 if name == "expert_ids" else 0
            parts = [
                np.pad(p, [(0, 0)] * 3 + [(0, K - p.shape[-1])], constant_values=fill)
                for p in parts
            ]
        return np.concatenate(parts)

    invalid = [out.invalid_router for out in outs if out.invalid_router is not None]
    arrays = {f.name: joined(f.name) for f in fields(StepOutput) if f.name != "invalid_router"}
    return StepOutput(**arrays, invalid_router=min(invalid, default=None))  # type: ignore[arg-type]


def _norm(
    norm: Norm | None, weights: Mapping[str, Tensor], path: str
) -> Callable[[Tensor], Tensor] | None:
    return None if norm is None else ops.make_norm(norm, weights[f"{path}.weight"])


def _keeps_state(run: Any) -> bool:
    return isinstance(run, ops.TorchAttention)
