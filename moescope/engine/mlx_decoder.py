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
from collections.abc import Callable, Sequence
from functools import cache, partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine import mlx_operators as ops
from moescope.engine.decoder import DecoderSpec
from moescope.engine.interpreter import Draw, StepOutput, routers_of
from moescope.engine.mlx_forward import Forward
from moescope.engine.mlx_limits import refuse_unsupported
from moescope.engine.mlx_operators import record as records
from moescope.engine.mlx_policies import InForce, in_force
from moescope.engine.mlx_states import LaneStates, States
from moescope.engine.outputs import merged
from moescope.engine.rewind import Past
from moescope.engine.steered_lanes import steer, steered_now
from moescope.engine.steps import K_LIMIT, Policies
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import mlx_ops
from moescope.kernels.spec import RouterPolicy, RouterSpec, Routing
from moescope.kernels.twins import Difference
from moescope.trace.frames import RecordLevel

SEEN = 128  # rows of the caches a step looks at: this, or a power of two times it
KEPT_STEPS = 64  # compiled steps, one for each set of shapes
Step = Callable[[mx.array, mx.array, mx.array, States], tuple[list[mx.array], States]]


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
        _keep_in_memory()
        self._thread = threading.get_ident()
        self.spec, self.dtype = spec, dtype
        self.vocab_size = spec.vocab_size
        self.routers = routers_of(
            spec, dtype, lambda name: np.array(ops.array(weights[name]).astype(mx.float32))
        )
        if compiled is None:
            compiled = mx.metal.is_available() or os.environ.get("MOESCOPE_MLX_COMPILE") == "1"
        self.compiled = compiled and compiles()
        self.forward = Forward(spec, weights, self.routers, dtype)
        self._states = LaneStates(self.forward.operators)
        self._lanes = self._capacity = 0
        self._lengths: list[int] = []
        self._pasts: list[Past] = []  # of lanes, where state is rewritten
        self._policies = Policies([router.spec for router in self.routers])
        self._in_force: dict[tuple[int, ...], InForce] = {}
        self._steps: dict[ops.Static, Step] = {}
        self.traced = 0  # how often a step's operations were written down anew
        metal = [mlx_ops.uses_metal(r.spec.E, min(r.spec.E, K_LIMIT)) for r in self.routers]
        self._traces_fields = not all(metal)  # the Metal kernel reads policies whole
        self.kernels = _kernels(weights, self.compiled, any(metal))
        self.twin = "mlx operators" if any(metal) else ""
        self._slow_router, self._apart = False, Difference()
        self.intervene: Callable[..., Routing] | None = None

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
            self._states.grow(lanes, capacity)
        except (RuntimeError, MemoryError) as error:
            size = self.cache_bytes(lanes, capacity) / 1e9
            raise MoescopeError(
                f"no memory for a cache of {size:.1f} GB ({lanes} lanes of {capacity} tokens)",
                hint="fewer lanes or a shorter context",
                code=ExitCode.RESOURCES,
            ) from error
        if capacity > self._capacity:
            self.forward.rotate(capacity)
        self._lengths += [0] * (lanes - self._lanes)
        self._pasts += [Past() for _ in range(lanes - self._lanes)]
        self._lanes, self._capacity = lanes, capacity
        self._steps.clear()
        self._policies.open(lanes)
        self._in_force.clear()

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

    def set_intervention(self, intervene: Callable[..., Routing] | None) -> None:
        """See, and replace, what every router decides (`Call.intervene`); None: no longer. Nothing
        compiled runs meanwhile."""
        self._here()
        self.intervene = intervene

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
        self._here()
        assert 0 <= length <= self._lengths[lane]
        if self._states.rewritten and length < self._lengths[lane]:
            self._rewind(lane, length)
        self._lengths[lane] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""
        self._here()
        assert 0 <= length <= self._lengths[source]
        if source != target:
            self._states.copy(source, target)
            self._lengths[target] = self._lengths[source]
            self._pasts[target] = self._pasts[source].copied(self._lengths[source])
        self.truncate(target, length)

    def _remember(self, lane: int, ids: list[int]) -> None:
        """What a lane was fed, and now and then what its operators hold."""
        past = self._pasts[lane]
        past.fed(ids, (self._policies.specs[lane], steered_now(self, lane)))
        if past.wants_snapshot(len(ids)):
            saved = self._states.save(lane)
            past.save(saved, sum(array.nbytes for array in saved))

    def _rewind(self, lane: int, length: int) -> None:
        """Restore the nearest snapshot, and feed again what came after it."""
        past = self._pasts[lane]
        start = past.nearest(length)
        self._states.restore(lane, past.snapshots[start] if start else None)
        self._lengths[lane] = start
        now = self._policies.specs[lane], steered_now(self, lane)
        for ids, (specs, steered) in past.spans(start, length):
            self._policies.set(lane, specs)
            steer(self, lane, steered)
            self._in_force.clear()
            self._run((lane,), np.array([ids], np.int64), False, "ids")
            self._lengths[lane] += len(ids)
        self._policies.set(lane, now[0])
        steer(self, lane, now[1])
        self._in_force.clear()
        past.cut(length)

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        """Bytes of state `open` would allocate."""
        return self._states.bytes_of(lanes, capacity)

    def use_slow_router(self, on: bool) -> None:
        """From the next call on, plain operators route, and the Metal kernel beside them."""
        assert self.twin
        self._slow_router, self._apart = on, Difference()

    def router_difference(self) -> Difference:
        """Between the two since the slow one was switched on."""
        return self._apart

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
            out = outs[0] if len(outs) == 1 else merged(outs)
            mx.clear_cache()
        for lane, row in zip(lanes, ids, strict=True):
            self._lengths[lane] += ids.shape[1]
            if self._states.rewritten:
                self._remember(lane, row.tolist())
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
        policies = self._policies_of(lanes)
        keep_logits = record == "logits" or self.intervene is not None
        static, inputs = self._prepared(lanes, ids, policies, all_logits, keep_logits)
        step = self._step(static)
        # The caches are handed over, so that they are written to where they lie.
        states = self._states.taken()
        try:
            whole, states = step(*inputs, states)
        finally:
            self._states.held = states
            del states
        mx.eval(whole, self._states.held)
        if static.slow_router:
            *whole, integers, floats = whole
            self._apart += records.apart(whole[1:3], (integers, floats))
        logits = whole[0].reshape(len(lanes), -1, self.vocab_size)
        return records.output(logits, whole[1:], static, record, policies.shadow_K)

    def _prepared(
        self,
        lanes: tuple[int, ...],
        ids: NDArray[np.int64],
        policies: InForce,
        all_logits: bool,
        keep_logits: bool,
    ) -> tuple[ops.Static, tuple[mx.array, mx.array, mx.array]]:
        """What a call is compiled for, and the token ids [R], positions [R] and policies [L, R, P,
        WIDTH] that it reads."""
        tokens = ids.shape[1]
        starts = np.array([self._lengths[lane] for lane in lanes])
        traced = self._traces_fields or self._slow_router
        static = ops.Static(
            lanes=lanes,
            tokens=tokens,
            start=int(starts[0]) if tokens > 1 else 0,
            seen=_bucket(int(starts.max()) + 1, self._capacity) if tokens == 1 else 0,
            picks=policies.picks,
            recorded=policies.recorded,
            gate_bits=policies.gate_bits,
            fields=policies.fields if traced else frozenset(),
            scales_output=policies.scales_output,
            shadows=len(self._policies.shadows),
            keep_logits=keep_logits,
            all_logits=all_logits,
            slow_router=self._slow_router,
        )
        positions = (starts[:, None] + np.arange(tokens)).reshape(-1)
        rows = policies.rows
        if tokens > 1:
            rows = mx.broadcast_to(rows, (rows.shape[0], tokens, *rows.shape[2:]))
        fed, at = (mx.array(a.reshape(-1).astype(np.int32)) for a in (ids, positions))
        return static, (fed, at, rows)

    def _step(self, static: ops.Static) -> Step:
        """What runs a call of this shape; compiled where single tokens are."""
        if self.intervene is not None:
            starts = tuple(self._lengths[lane] for lane in static.lanes)
            return partial(self.forward, static, intervene=self.intervene, starts=starts)
        step: Step = partial(self._traced, static)
        if static.tokens > 1 or not self.compiled:
            return step
        if static not in self._steps:
            if len(self._steps) >= KEPT_STEPS:
                self._steps.clear()
            self._steps[static] = mx.compile(step)
        return self._steps[static]

    def _traced(
        self, static: ops.Static, ids: mx.array, positions: mx.array, rows: mx.array, states: States
    ) -> tuple[list[mx.array], States]:
        self.traced += static.tokens == 1
        return self.forward(static, ids, positions, rows, states)

    def _policies_of(self, lanes: tuple[int, ...]) -> InForce:
        found = self._in_force.get(lanes)
        if found is None:
            found = self._in_force[lanes] = in_force(self._policies.rows[list(lanes)], self.routers)
        return found


def _bucket(needed: int, capacity: int) -> int:
    """How many rows of the caches to look at, so that few lengths have a step of their own."""
    seen = SEEN
    while seen < needed:
        seen *= 2
    return min(seen, capacity)


def _keep_in_memory() -> None:
    """Let macOS not page out what the GPU uses, as far as Metal recommends: between two tokens of a
    large model it otherwise may."""
    if mx.metal.is_available():
        most = mx.device_info().get("max_recommended_working_set_size")
        if most is not None:
            mx.set_wired_limit(int(most))


@cache
def compiles() -> bool:
    """Whether MLX compiles here: always on Metal; on a CPU it needs a C++ compiler at run time."""
    try:
        mx.eval(mx.compile(lambda x: mx.abs(x) + 1)(mx.zeros(1)))
    except RuntimeError:
        return False
    return True


def _kernels(weights: ops.Weights, compiled: bool, metal: bool) -> dict[str, str]:
    """`metal`: whether the Metal kernel routes."""
    packed = {str(w) for w in weights.values() if isinstance(w, ops.Packed | ops.Above)}
    where = "Metal" if mx.metal.is_available() else "CPU"
    return {
        "attention": "mlx sdpa",
        "router": "metal" if metal else "mlx operators",
        "experts": "mlx " + (f"gather_qmm: {', '.join(sorted(packed))}" if packed else "gather_mm"),
        "step": f"compiled: mlx {where}" if compiled else f"plain: mlx {where}, not compiled",
        "prompts": "mlx",
    }
