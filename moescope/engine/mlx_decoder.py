"""The MLX interpreter of `DecoderSpec`: Metal on Apple silicon, and MLX's CPU elsewhere.

It owns lanes (their lengths, policies and state), runs the layers' branches, and hands out what
every router decided as numpy. Single tokens go through one compiled function, in which lanes'
positions and policies are data: a toggle traces nothing again unless it changes a shape. Prompts
are run as they come, lane by lane. Operators are in `mlx_operators`. MLX wants one thread and
checks no index: so does, and does, this file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine import mlx_operators as ops
from moescope.engine.decoder import (
    RESIDUAL,
    Branch,
    DecoderSpec,
    MoE,
    Rope,
    RoutedAttention,
    rotary_embeddings,
)
from moescope.engine.interpreter import Draw, Router, StepOutput
from moescope.engine.mlx_limits import refuse_unsupported
from moescope.engine.mlx_operators import record as records
from moescope.engine.steps import K_LIMIT, Policies
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.mlx_ops import fields_of
from moescope.kernels.policy_rows import COLUMN
from moescope.kernels.spec import RouterPolicy, RouterSpec
from moescope.trace.frames import RecordLevel

SEEN = 128  # rows of the caches a step looks at: this, or a power of two times it
KEPT_STEPS = 64  # compiled steps, one for each set of shapes
States = list[list[mx.array]]  # per operator
Normalise = Callable[[mx.array], mx.array] | None
Branching = tuple[Normalise, ops.MLXOperator, Normalise, Branch]  # pre-norm, operator, post-norm
Step = Callable[[mx.array, mx.array, mx.array, States], tuple[list[mx.array], States]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer."""

    branches: list[Branching]
    scale: mx.array | None  # of the residual after the layer


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    """The policies of some lanes, as a step reads them and as it is compiled for them."""

    rows: mx.array  # [L, N, P, WIDTH]
    picks: tuple[int, ...]
    recorded: tuple[int, ...]
    gate_bits: tuple[int, ...]
    fields: frozenset[str]
    shadow_K: int


class MLXDecoder:
    """A loaded model; see `interpreter.Interpreter`. `weights` are the tensors of
    `parameters.slots(spec)` by name, matrices packed or in `dtype`. With `compiled` False single
    tokens are run as prompts are, operation by operation. None: compiled on Metal, and elsewhere
    where MOESCOPE_MLX_COMPILE is 1: a CPU needs a C++ compiler for it, and a second for each of
    some thirty kernels."""

    draws = False
    device = "mlx"

    def __init__(
        self, spec: DecoderSpec, weights: ops.Weights, *, dtype: str, compiled: bool | None = None
    ) -> None:
        refuse_unsupported(spec)
        self._thread = threading.get_ident()
        self.spec, self.dtype = spec, dtype
        self.vocab_size = spec.vocab_size
        self.routers = tuple(
            Router(layer, router.resolved(dtype), {}) for layer, _, router in spec.routers()
        )
        if compiled is None:
            compiled = mx.metal.is_available() or os.environ.get("MOESCOPE_MLX_COMPILE") == "1"
        self.compiled = compiled and compiles()
        self._embed = ops.matrix(weights["embed.weight"])
        self._head = self._embed if spec.tied_head else ops.matrix(weights["head.weight"])
        self._head_bias = ops.array(weights["head.bias"]) if spec.head_bias else None
        self._final = ops.load_norm(spec.final_norm, weights, "final_norm")
        self._stages = self._build(weights)
        self._operators = [run for stage in self._stages for _, run, _, _ in stage.branches]
        self._ropes = {
            id(rope): rope
            for _, branch in spec.operators()
            for rope in rotary_embeddings(branch.operator)
        }
        self._tables: dict[int, tuple[mx.array, mx.array]] = {}  # by the id of a rope
        self._states: States = [[] for _ in self._operators]
        self._lanes = self._capacity = 0
        self._lengths: list[int] = []
        self._policies = Policies([router.spec for router in self.routers])
        self._in_force: dict[tuple[int, ...], InForce] = {}
        self._steps: dict[ops.Static, Step] = {}
        self.traced = 0  # how often a step's operations were written down anew
        self.kernels = _kernels(weights, self.compiled)

    def _build(self, weights: ops.Weights) -> list[Stage]:
        routers = 0
        stages: list[Stage] = []
        for number, layer in enumerate(self.spec.layers):
            branches: list[Branching] = []
            for branch in layer.branches:
                path, operator = f"layers.{number}.{branch.name}", branch.operator
                if isinstance(operator, MoE | RoutedAttention):
                    operator = replace(operator, router=self.routers[routers].spec)
                run = ops.OPERATORS[type(operator)](operator, weights, path, self.dtype, routers)
                routers += isinstance(operator, MoE | RoutedAttention)
                pre = ops.load_norm(branch.pre_norm, weights, f"{path}.pre_norm")
                post = ops.load_norm(branch.post_norm, weights, f"{path}.post_norm")
                branches.append((pre, run, post, branch))
            scale = ops.array(weights[f"layers.{number}.scale"]) if layer.learned_scale else None
            stages.append(Stage(branches, scale))
        return stages

    def _here(self) -> None:
        assert threading.get_ident() == self._thread, "MLX arrays stay on the thread that made them"

    # --- lanes ------------------------------------------------------------------------------

    def open(self, lanes: int, capacity: int) -> None:
        """Allocate, or re-allocate and lose nothing, for `lanes` lanes of `capacity` tokens."""
        self._here()
        lanes, capacity = max(lanes, self._lanes), max(capacity, self._capacity)
        if (lanes, capacity) == (self._lanes, self._capacity):
            return
        try:
            held = [run.state(lanes, capacity) for run in self._operators]
            self._states = [
                [_grown(old[place : place + 1], kind) for place, kind in enumerate(kinds)]
                for old, kinds in zip(self._states, held, strict=True)
            ]
            mx.eval(self._states)
        except (RuntimeError, MemoryError) as error:
            size = self.cache_bytes(lanes, capacity) / 1e9
            raise MoescopeError(
                f"no memory for a cache of {size:.1f} GB ({lanes} lanes of {capacity} tokens)",
                hint="fewer lanes or a shorter context",
                code=ExitCode.RESOURCES,
            ) from error
        if capacity > self._capacity:
            self._tables = {key: self._table(rope, capacity) for key, rope in self._ropes.items()}
        self._lengths += [0] * (lanes - self._lanes)
        self._lanes, self._capacity = lanes, capacity
        self._steps.clear()
        self._policies.open(lanes)
        self._in_force.clear()

    def _table(self, rope: Rope, capacity: int) -> tuple[mx.array, mx.array]:
        dtype = mx.float32 if rope.applies == "float32" else ops.DTYPES[self.dtype]
        cos, sin = (mx.array(a).astype(dtype) for a in ops.rotary_table(rope, capacity))
        return cos, sin

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        """From the next call on, `lane` routes under these, one per router."""
        self._here()
        self._policies.set(lane, self._specs_of(policies))
        self._in_force.clear()

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        """Route every row under these variants too, and execute nothing of it."""
        self._here()
        self._policies.set_shadows([self._specs_of(variant) for variant in policies])
        self._in_force.clear()

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
            specs.append(RouterSpec(policy, router.spec.wiring).resolved(self.dtype))
        return specs

    def length(self, lane: int) -> int:
        """Tokens the lane holds."""
        return self._lengths[lane]

    def truncate(self, lane: int, length: int) -> None:
        """Forget everything from `length` on."""
        assert 0 <= length <= self._lengths[lane]
        self._lengths[lane] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""
        self._here()
        assert 0 <= length <= self._lengths[source]
        if source != target:
            states, self._states = self._states, []
            for arrays in states:
                for place, array in enumerate(arrays):
                    row = array[source : source + 1]
                    arrays[place] = mx.slice_update(array, row, mx.array([target]), (0,))
            del array, row
            mx.eval(states)
            self._states = states
        self._lengths[target] = length

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        """Bytes of state `open` would allocate."""
        return sum(held.nbytes for run in self._operators for held in run.state(lanes, capacity))

    # --- running ----------------------------------------------------------------------------

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """Feed T tokens to each of N lanes (token_ids [N, T]) after what they already hold.

        Raises MoescopeError for an id outside the vocabulary and for a lane that is full; the lanes
        are then as they were.
        """
        self._here()
        lanes, ids = tuple(lanes), np.ascontiguousarray(token_ids, dtype=np.int64)
        self._check(lanes, ids)
        if ids.shape[1] == 1:
            out = self._run(lanes, ids, False, record)
        else:
            # A prompt lane by lane: what a lane computes must not depend on who is beside it.
            outs = [
                self._run((lane,), ids[n : n + 1], all_logits, record)
                for n, lane in enumerate(lanes)
            ]
            out = outs[0] if len(outs) == 1 else records.merged(outs)
            mx.clear_cache()
        for lane in lanes:
            self._lengths[lane] += ids.shape[1]
        return out

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

    def _run(
        self, lanes: tuple[int, ...], ids: NDArray[np.int64], all_logits: bool, record: RecordLevel
    ) -> StepOutput:
        tokens = ids.shape[1]
        starts = np.array([self._lengths[lane] for lane in lanes])
        policies = self._policies_of(lanes)
        static = ops.Static(
            lanes=lanes,
            tokens=tokens,
            start=int(starts[0]) if tokens > 1 else 0,
            seen=_bucket(int(starts.max()) + 1, self._capacity) if tokens == 1 else 0,
            picks=policies.picks,
            recorded=policies.recorded,
            gate_bits=policies.gate_bits,
            fields=policies.fields,
            shadows=len(self._policies.shadows),
            keep_logits=record == "logits",
            all_logits=all_logits,
        )
        positions = (starts[:, None] + np.arange(tokens)).reshape(-1)
        rows = policies.rows
        if tokens > 1:
            rows = mx.broadcast_to(rows, (rows.shape[0], tokens, *rows.shape[2:]))
        step = self._step(static)
        # The caches are handed over, so that they are written to where they lie.
        states, self._states = self._states, []
        whole, states = step(
            mx.array(ids.reshape(-1).astype(np.int32)),
            mx.array(positions.astype(np.int32)),
            rows,
            states,
        )
        self._states = states
        mx.eval(whole, states)
        logits = whole[0].reshape(len(lanes), -1, self.vocab_size)
        return records.output(logits, whole[1:], static, record, policies.shadow_K)

    def _step(self, static: ops.Static) -> Step:
        """What runs a call of this shape; compiled where single tokens are."""
        step: Step = partial(self._forward, static)
        if static.tokens > 1 or not self.compiled:
            return step
        if static not in self._steps:
            if len(self._steps) >= KEPT_STEPS:
                self._steps.clear()
            self._steps[static] = mx.compile(step)
        return self._steps[static]

    def _forward(
        self, static: ops.Static, ids: mx.array, positions: mx.array, rows: mx.array, states: States
    ) -> tuple[list[mx.array], States]:
        """ids, positions [R], rows [L, R, P, WIDTH] -> next-token logits and what the routers
        decided, and the state after it."""
        self.traced += static.tokens == 1
        spec, state = self.spec, iter(states)
        call = ops.Call(static, ids, positions, rows, self._rotations(static, positions))
        x = self._embed.take(ids)  # [R, H]
        if spec.embedding_scale != 1.0:
            x = x * mx.array(spec.embedding_scale, x.dtype)
        taps = {RESIDUAL: x}
        after: States = []
        for stage in self._stages:
            taps = _run_layer(stage, taps, call, spec.carried, state, after)
        x = taps[RESIDUAL]
        if static.tokens > 1 and not static.all_logits:
            x = x[-1:]
        logits = self._head(x if self._final is None else self._final(x), self._head_bias)
        return [self._scaled(logits), *records.stacked(call.routings)], after

    def _scaled(self, logits: mx.array) -> mx.array:
        spec = self.spec
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap:
            logits = mx.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits

    def _rotations(
        self, static: ops.Static, positions: mx.array
    ) -> dict[int, tuple[mx.array, mx.array]]:
        """cos and signed sin of every row [R, 1, dims], by the id of a rope."""
        found = {}
        for key, rope in self._ropes.items():
            at, (cos, sin) = positions, self._tables[key]
            if ops.switches(rope):
                assert rope.scaling is not None
                length = positions + 1 if static.tokens == 1 else static.start + static.tokens
                at = positions + (length > rope.scaling.original_context) * self._capacity
            found[key] = cos[at][:, None], sin[at][:, None]
        return found

    def _policies_of(self, lanes: tuple[int, ...]) -> InForce:
        """What the lanes route under: rows of numbers, and what of them decides shapes."""
        found = self._in_force.get(lanes)
        if found is None:
            rows = self._policies.rows[list(lanes)].transpose(2, 0, 1, 3)  # [L, N, P, WIDTH]
            K = rows[..., COLUMN["num_experts_per_tok"]].astype(int)
            fields = [
                fields_of(r, router.spec.E) for r, router in zip(rows, self.routers, strict=True)
            ]
            found = self._in_force[lanes] = InForce(
                rows=mx.array(rows.astype(np.float32)),
                picks=tuple(K[:, :, 0].max(1).tolist()),
                recorded=tuple(K.max((1, 2)).tolist()),
                gate_bits=tuple(np.unique(rows[..., COLUMN["gate"]]).astype(int).tolist()),
                fields=frozenset().union(*fields),
                shadow_K=int(K[:, :, 1:].max(initial=0)),
            )
        return found


def _run_layer(
    stage: Stage,
    taps: dict[str, mx.array],
    call: ops.Call,
    carried: tuple[str, ...],
    states: Iterator[list[mx.array]],
    after: States,
) -> dict[str, mx.array]:
    """The taps after a layer: the residual, and those that live on. Every operator takes its state
    from `states`, and what it is afterwards goes to `after`."""
    call.taps = taps = dict(taps)
    for pre, run, post, branch in stage.branches:
        call.read, call.state = taps[branch.reads], next(states)
        y = run(call.read if pre is None else pre(call.read), call)
        after.append(call.state)
        if post is not None:
            y = post(y)
        if branch.multiplier != 1.0:
            y = y * branch.multiplier
        held = taps.get(branch.adds_to)
        if held is not None and branch.keeps != 1.0:
            held = held * branch.keeps
        taps[branch.adds_to] = y if held is None else held + y
    if stage.scale is not None:
        taps[RESIDUAL] = taps[RESIDUAL] * stage.scale
    return {name: value for name, value in taps.items() if name in (RESIDUAL, *carried)}


def _grown(old: list[mx.array], held: ops.Held) -> mx.array:
    """Zeros of the wanted shape, holding what there was."""
    new = mx.zeros(held.shape, held.dtype)
    return mx.slice_update(new, old[0], mx.array([0]), (0,)) if old else new


def _bucket(needed: int, capacity: int) -> int:
    """How many rows of the caches to look at, so that few lengths have a step of their own."""
    seen = SEEN
    while seen < needed:
        seen *= 2
    return min(seen, capacity)


@cache
def compiles() -> bool:
    """Whether MLX compiles here: always on Metal; on a CPU it needs a C++ compiler at run time."""
    try:
        mx.eval(mx.compile(lambda x: mx.abs(x) + 1)(mx.zeros(1)))
    except RuntimeError:
        return False
    return True


def _kernels(weights: ops.Weights, compiled: bool) -> dict[str, str]:
    metal = mx.metal.is_available()
    packed = {str(w) for w in weights.values() if isinstance(w, ops.Packed | ops.Above)}
    where = "Metal" if metal else "CPU"
    return {
        "attention": "mlx sdpa",
        "router": "metal" if metal else "mlx operators",
        "experts": "mlx " + (f"gather_qmm: {', '.join(sorted(packed))}" if packed else "gather_mm"),
        "step": f"compiled: mlx {where}" if compiled else f"plain: mlx {where}, not compiled",
        "prompts": "mlx",
    }
