"""The torch interpreter of `DecoderSpec`: CPU and CUDA, whole or layer by layer on several devices.

It owns lanes (their lengths, policies and cache rows), runs the layers' branches, and collects what
every router decided. The operators are in `torch_operators`; where a fused step covers the
decoder (`steps.py`), single tokens go through that. It never asks for a model type: what a spec
asks for and is not in here is refused by the name of the field.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moescope.engine import torch_operators as ops
from moescope.engine.decoder import RESIDUAL, Branch, DecoderSpec, state_bytes
from moescope.engine.interpreter import Draw, StepOutput, routers_of
from moescope.engine.limits import refuse_unsupported
from moescope.engine.operators import MoE, Rope, RoutedAttention, rotary_embeddings
from moescope.engine.outputs import merged
from moescope.engine.rewind import Past
from moescope.engine.router_twins import RouterTwins, backend_of
from moescope.engine.steered_lanes import steer, steered_now
from moescope.engine.steps import K_LIMIT, Policies, Shared, Step, fused_step
from moescope.engine.torch_operators.record import collect
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, Routing
from moescope.kernels.twins import Difference
from moescope.trace.frames import RecordLevel

Normalise = Callable[[Tensor], Tensor] | None
# pre-norm, operator, post-norm, the sum
Branching = tuple[Normalise, ops.TorchOperator, Normalise, Branch, ops.Adds]


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer, where it lives."""

    device: str
    branches: list[Branching]
    scale: Tensor | None  # of the residual after the layer
    dtype: torch.dtype  # that operators read the residual in


class TorchDecoder:
    """A loaded model; see `interpreter.Interpreter`. `weights` are the tensors of
    `parameters.slots(spec)` by name, in `dtype`. `devices` names the device of every layer, where
    they are not all on `device`, which holds the embedding, the final norm and the head. `fused`
    False keeps single tokens on the torch operators too."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, Tensor],
        *,
        device: str,
        dtype: str,
        devices: Sequence[str] = (),
        fused: bool = True,
    ) -> None:
        refuse_unsupported(spec)
        self.spec, self.device, self.dtype = spec, device, dtype
        self.vocab_size = spec.vocab_size
        self.routers = routers_of(spec, dtype, lambda name: weights[name].float().cpu().numpy())
        self.kernels = {"attention": "torch sdpa", "router": "torch", "experts": "torch"}
        self._embed = weights["embed.weight"]
        self._head = weights["embed.weight" if spec.tied_head else "head.weight"]
        if spec.norm_head:
            self._head = ops.with_unit_columns(self._head)
        self._head_bias = weights.get("head.bias")
        self._final = ops.load_norm(spec.final_norm, weights, "final_norm")
        self._start = ops.load_embedding(spec, weights)
        self._stages = self._build(weights, devices or [device] * len(spec.layers))
        self._devices = sorted({stage.device for stage in self._stages} | {device})
        self._operators = [
            (stage.device, branching[1]) for stage in self._stages for branching in stage.branches
        ]
        self._attentions: list[tuple[str, ops.TorchAttention]] = [
            (device, run) for device, run in self._operators if isinstance(run, ops.TorchAttention)
        ]
        self._ropes = self._rotary_embeddings()
        self._tables: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # (device, rope's id)
        self._recurrent = [run for _, run in self._operators if isinstance(run, ops.Recurrent)]
        self._lengths: list[int] = []
        self._pasts: list[Past] = []  # of lanes, where state is rewritten
        self._interned: dict[RouterSpec, RouterSpec] = {}
        trained = [self._intern(router.spec) for router in self.routers]
        self.policies = Policies(trained)
        self.shared = Shared(spec, weights, device, dtype, self.routers, self.policies)
        self.shared.operators = tuple(run for _, run in self._operators)
        self.shared.head = self._head
        me = weakref.proxy(self)  # what it lends to a step does not hold it
        self.shared.prepare = lambda *rows, **options: me._prepare(*rows, **options)[device]
        self._groups: dict[tuple[str, tuple[int, ...], int], list[ops.Groups]] = {}
        self.intervene: Callable[..., Routing] | None = None
        self.step: Step | None = None
        self.why_no_step = "switched off"
        if len(self._devices) > 1:
            self.why_no_step = "layers on several devices"
        elif fused:
            self.step, self.why_no_step = fused_step(self.shared)
        self.draws = self.step is not None and self.step.draws
        if self.step is not None:
            self.kernels = dict(self.step.kernels)
        else:
            self.kernels["step"] = f"torch: {self.why_no_step}"
        self.kernels["prompts"] = "torch" + self._grouped_experts()
        self.twin = "torch" if backend_of(self.kernels["router"]) else ""
        self.twins: RouterTwins | None = None  # while the slow twin routes

    def _build(self, weights: Mapping[str, Tensor], devices: Sequence[str]) -> list[Stage]:
        dtype = ops.DTYPES[self.dtype]
        routers = 0
        stages: list[Stage] = []
        for number, layer in enumerate(self.spec.layers):
            branches: list[Branching] = []
            for branch in layer.branches:
                path, operator = f"layers.{number}.{branch.name}", branch.operator
                if isinstance(operator, MoE | RoutedAttention):
                    operator = replace(operator, router=self.routers[routers].spec)
                run = ops.OPERATORS[type(operator)](operator, weights, path, dtype, routers)
                routers += isinstance(operator, MoE | RoutedAttention)
                pre = ops.load_norm(branch.pre_norm, weights, f"{path}.pre_norm")
                post = ops.load_norm(branch.post_norm, weights, f"{path}.post_norm")
                adds = ops.load_adds(branch, weights, path)
                branches.append((pre, run, post, branch, adds))
            scale = weights[f"layers.{number}.scale"] if layer.learned_scale else None
            stages.append(Stage(devices[number], branches, scale, dtype))
        return stages

    def _grouped_experts(self) -> str:
        """What beside torch runs the experts of many rows."""
        runs = [branching[1] for stage in self._stages for branching in stage.branches]
        grouped = [run for run in runs if isinstance(run, ops.TorchMoE) and run.experts.grouped]
        return (", experts native" if self.device == "cpu" else ", experts triton") * bool(grouped)

    def operators(self) -> Iterator[tuple[int, Branch, ops.TorchOperator]]:
        """Every running operator with its layer and its branch, in execution order."""
        for number, stage in enumerate(self._stages):
            for _, run, _, branch, _ in stage.branches:
                yield number, branch, run

    # --- lanes ------------------------------------------------------------------------------

    def open(self, lanes: int, capacity: int) -> None:
        """Allocate, or re-allocate and lose nothing, for `lanes` lanes of `capacity` tokens."""
        shared = self.shared
        lanes, capacity = max(lanes, shared.lanes), max(capacity, shared.capacity)
        if lanes == shared.lanes and capacity == shared.capacity:
            return
        with torch.inference_mode():
            try:
                for device, operator in self._operators:
                    operator.open(lanes, capacity, device)
            except (RuntimeError, MemoryError) as error:
                size = self.cache_bytes(lanes, capacity) / 1e9
                raise MoescopeError(
                    f"no memory for a cache of {size:.1f} GB ({lanes} lanes of {capacity} tokens)",
                    hint="fewer lanes or a shorter context",
                    code=ExitCode.RESOURCES,
                ) from error
            if capacity > shared.capacity:
                self._rotate(capacity)
        self._lengths += [0] * (lanes - shared.lanes)
        self._pasts += [Past() for _ in range(lanes - shared.lanes)]
        shared.lanes, shared.capacity = lanes, capacity
        shared.caches = [attention.cache for _, attention in self._attentions]
        self.policies.open(lanes)
        if self.step is not None:
            self.step.opened()

    def _rotate(self, capacity: int) -> None:
        """Tables of the rotary embeddings for `capacity` positions, on every device."""
        self._tables = {}
        for device, rope in self._ropes:
            cos, sin = ops.rotary_table(rope, capacity, device)
            dtype = torch.float32 if rope.applies == "float32" else ops.DTYPES[self.dtype]
            self._tables[device, id(rope)] = cos.to(dtype), sin.to(dtype)
        self.shared.tables = {rope: table for (_, rope), table in self._tables.items()}
        self.shared.rotations = {
            number: self._tables[device, id(attention.spec.rope)]
            for number, (device, attention) in enumerate(self._attentions)
            if attention.spec.rope is not None
        }

    def _rotary_embeddings(self) -> list[tuple[str, Rope]]:
        """The rotary embeddings and the devices they are needed on, each once."""
        found = {
            (stage.device, id(rope)): rope
            for stage in self._stages
            for _, _, _, branch, _ in stage.branches
            for rope in rotary_embeddings(branch.operator)
        }
        return [(device, rope) for (device, _), rope in found.items()]

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        """From the next call on, `lane` routes under these, one per router."""
        self.policies.set(lane, self._specs_of(policies))
        self._groups.clear()

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        """Route every row under these variants too, and execute nothing of it."""
        self.policies.set_shadows([self._specs_of(variant) for variant in policies])

    def set_intervention(self, intervene: Callable[..., Routing] | None) -> None:
        """See, and replace, what every router decides (`Call.intervene`); None: no longer. The
        fused step, which shows nothing, waits meanwhile."""
        self.intervene = intervene

    def use_slow_router(self, on: bool) -> None:
        """Route on the torch operators, beside the kernel; the fused step waits meanwhile."""
        assert self.twin
        self.twins = RouterTwins(self.kernels["router"]) if on else None

    def router_difference(self) -> Difference:
        """Between the two since the slow one was switched on."""
        return Difference() if self.twins is None else self.twins.apart

    def _specs_of(self, policies: Sequence[RouterPolicy]) -> list[RouterSpec]:
        assert len(policies) == len(self.routers), "one policy per router"
        specs = []
        for router, policy in zip(self.routers, policies, strict=True):
            limit = max(router.spec.K, min(router.spec.E, K_LIMIT))
            if policy.num_experts_per_tok > limit:
                raise MoescopeError(
                    f"num_experts_per_tok: expected 1..{limit}, found {policy.num_experts_per_tok}"
                )
            trained = router.spec.policy
            for name in ("correction_bias", "per_expert_scale"):
                off = RouterPolicy.__dataclass_fields__[name].default
                if getattr(policy, name) != off == getattr(trained, name):
                    raise MoescopeError(f"{name}: this model has no tensor for it")
            spec = RouterSpec(policy, router.spec.wiring).resolved(self.dtype)
            specs.append(self._intern(spec))
        return specs

    def _intern(self, spec: RouterSpec) -> RouterSpec:
        """One object per spec, so that lanes are grouped by identity."""
        return self._interned.setdefault(spec, spec)

    def length(self, lane: int) -> int:
        """Tokens the lane holds."""
        return self._lengths[lane]

    def truncate(self, lane: int, length: int) -> None:
        """Forget everything from `length` on."""
        assert 0 <= length <= self._lengths[lane]
        if self._recurrent and length < self._lengths[lane]:
            self._rewind(lane, length)
        self._lengths[lane] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""
        assert 0 <= length <= self._lengths[source]
        if source != target:
            with torch.inference_mode():
                for _, operator in self._operators:
                    operator.copy(source, target, length)
            self._lengths[target] = self._lengths[source]
            self._pasts[target] = self._pasts[source].copied(self._lengths[source])
        self.truncate(target, length)
        self.shared.edits += 1

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
        draws: Sequence[Draw] | None = None,
        together: bool = False,
    ) -> StepOutput:
        """Feed T tokens to each of N lanes (token_ids [N, T]) after what they already hold.

        `together` feeds prompts as one batch: faster, and rounded by who is beside whom.

        Raises MoescopeError for an id outside the vocabulary and for a lane that is full; the lanes
        are then as they were.
        """
        lanes, ids = tuple(lanes), np.ascontiguousarray(token_ids, dtype=np.int64)
        self._check(lanes, ids)
        if ids.shape[1] == 1:
            out = self._one(lanes, ids, record, draws)
        elif together:
            out = self._run(lanes, ids, all_logits, record)
        else:
            # A prompt lane by lane: what a lane computes must not depend on who is beside it.
            outs = [
                self._run((lane,), ids[n : n + 1], all_logits, record)
                for n, lane in enumerate(lanes)
            ]
            out = outs[0] if len(outs) == 1 else merged(outs)
            self.shared.edits += 1
        for lane, row in zip(lanes, ids, strict=True):
            self._lengths[lane] += ids.shape[1]
            if self._recurrent:
                self._remember(lane, row.tolist())
        return out

    def _remember(self, lane: int, ids: list[int]) -> None:
        """What a lane was fed, and now and then what its operators hold."""
        past = self._pasts[lane]
        past.fed(ids, (self.policies.specs[lane], steered_now(self, lane)))
        if past.wants_snapshot(len(ids)):
            saved = [operator.save(lane) for operator in self._recurrent]
            past.save(saved, sum(part.nbytes for parts in saved for part in parts))

    @torch.inference_mode()
    def _rewind(self, lane: int, length: int) -> None:
        """Restore the nearest snapshot, and feed again what came after it."""
        past = self._pasts[lane]
        start = past.nearest(length)
        for number, operator in enumerate(self._recurrent):
            operator.restore(lane, past.snapshots[start][number] if start else None)
        self._lengths[lane] = start
        now = self.policies.specs[lane], steered_now(self, lane)
        for ids, (specs, steered) in past.spans(start, length):
            self.policies.specs[lane] = specs
            steer(self, lane, steered)
            self._groups.clear()
            self._run((lane,), np.array([ids], np.int64), False, "ids")
            self._lengths[lane] += len(ids)
        self.policies.specs[lane], steered = now
        steer(self, lane, steered)
        self._groups.clear()
        past.cut(length)

    def _one(
        self,
        lanes: tuple[int, ...],
        ids: NDArray[np.int64],
        record: RecordLevel,
        draws: Sequence[Draw] | None,
    ) -> StepOutput:
        if self.step is None or self.intervene is not None or self.twins is not None:
            self.shared.edits += 1
            return self._run(lanes, ids, False, record)
        starts = tuple(self._lengths[lane] for lane in lanes)
        return self.step(lanes, starts, ids[:, 0], record, draws)

    def _run(
        self, lanes: tuple[int, ...], ids: NDArray[np.int64], all_logits: bool, record: RecordLevel
    ) -> StepOutput:
        watched = self.intervene is not None or self.twins is not None
        calls = self._prepare(lanes, ids, keep_logits=watched or record == "logits")
        first = calls[self.device]
        taps = {RESIDUAL: self._embedded(first.token_ids)}
        for stage in self._stages:
            taps = _run_layer(stage, taps, calls[stage.device], self.spec.carried)
        x = taps[RESIDUAL].to(self.device).view(len(lanes), first.tokens, -1)
        if not all_logits:
            x = x[:, -1:]
        shape = x.shape[:2]
        x = x.flatten(0, 1)
        x = x.to(ops.DTYPES[self.dtype])
        x = self._final(x) if self._final else x
        logits = self._scaled(ops.linear(x, self._head, self._head_bias)).view(*shape, -1)
        return collect(first, logits, record)

    def _embedded(self, ids: Tensor) -> Tensor:
        """ids [R] -> the residual before the first layer [R, H]."""
        x = F.embedding(ids, self._embed)
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype)
        return self._start(x)

    def _scaled(self, logits: Tensor) -> Tensor:
        spec = self.spec
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits

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
        if needed > self.shared.capacity:
            raise MoescopeError(
                f"a lane holds at most {self.shared.capacity} tokens, {needed} are needed",
                code=ExitCode.RESOURCES,
            )

    def _prepare(
        self, lanes: tuple[int, ...], ids: NDArray[np.int64], *, keep_logits: bool
    ) -> dict[str, ops.Call]:
        """What the operators of one call share, by device; routings go into the same lists."""
        tokens = ids.shape[1]
        starts = tuple(self._lengths[lane] for lane in lanes)
        at = np.concatenate([np.arange(start, start + tokens) for start in starts])
        calls: dict[str, ops.Call] = {}
        choices: list[Tensor | None] = []
        routings: list[Routing] = []
        shadows: list[list[Routing]] = []
        for device in self._devices:
            positions = torch.from_numpy(at).to(device)
            calls[device] = ops.Call(
                lanes,
                starts,
                tokens,
                torch.from_numpy(ids).flatten().to(device),
                positions,
                self._grouped(device, lanes, tokens),
                self.policies.shadows,
                keep_logits,
                routings,
                shadows,
                {
                    id(rope): self._rotation(rope, device, positions, starts, tokens)
                    for place, rope in self._ropes
                    if place == device
                },
                choices=choices,
                intervene=self.twins.before(self.intervene) if self.twins else self.intervene,
            )
        return calls

    def _rotation(
        self, rope: Rope, device: str, positions: Tensor, starts: tuple[int, ...], tokens: int
    ) -> tuple[Tensor, Tensor]:
        """cos and signed sin of every row [R, 1, dims]."""
        cos, sin = self._tables[device, id(rope)]
        if ops.switches(rope):
            assert rope.scaling is not None
            long = [start + tokens > rope.scaling.original_context for start in starts]
            shift = torch.tensor(long, device=device).repeat_interleave(tokens)
            positions = positions + shift * self.shared.capacity
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def _grouped(self, device: str, lanes: tuple[int, ...], tokens: int) -> list[ops.Groups]:
        """Per router, the rows of lanes that route under the same spec."""
        if (found := self._groups.get((device, lanes, tokens))) is not None:
            return found
        every: list[ops.Groups] = []
        for index in range(len(self.routers)):
            rows: dict[int, list[int]] = {}
            specs: dict[int, RouterSpec] = {}
            for n, lane in enumerate(lanes):
                spec = self.policies.specs[lane][index]
                specs[id(spec)] = spec
                rows.setdefault(id(spec), []).extend(range(n * tokens, (n + 1) * tokens))
            if len(specs) == 1:
                every.append([(next(iter(specs.values())), None)])
            else:
                every.append([(specs[k], torch.tensor(rows[k], device=device)) for k in specs])
        if len(self._groups) > 64:
            self._groups.clear()
        self._groups[device, lanes, tokens] = every
        return every


def _run_layer(
    stage: Stage, taps: dict[str, Tensor], call: ops.Call, carried: tuple[str, ...]
) -> dict[str, Tensor]:
    """The taps after a layer: the residual, and those that live on."""
    taps = {name: value.to(stage.device) for name, value in taps.items()}
    call.taps = taps
    for pre, run, post, branch, adds in stage.branches:
        call.read = taps[branch.reads].to(stage.dtype)
        h = call.read if pre is None else pre(call.read)
        y = run(h, call)
        if post is not None:
            y = post(y)
        taps[branch.adds_to] = adds(y, taps.get(branch.adds_to))
    if stage.scale is not None:
        taps[RESIDUAL] = taps[RESIDUAL] * stage.scale
    return {name: value for name, value in taps.items() if name in (RESIDUAL, *carried)}
