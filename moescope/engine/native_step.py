"""The decode step on a CPU as a program of the C library, run for one token of N lanes.

A program is an array of `mk_op` over buffers of rows (`native/moescope_kernels.h` says what each
does); `native_program.py` writes it, once per allocation of the caches. Where an operator has no C
form the program stops, and its torch operator runs between two parts. Policies, shadows and gate
copies are read at run time. Needs `kernels.native_ops`; nothing here computes.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.kept import LEVELS, Kept
from moescope.engine.native_limits import picks, why_beside, why_not_native
from moescope.engine.native_program import Beside, Program
from moescope.engine.operators import MLA, Attention, MoE, RoutedAttention
from moescope.engine.sampling import expectations_of
from moescope.engine.steps import Shared
from moescope.kernels import native_ops as native
from moescope.kernels.policy_rows import COLUMN
from moescope.trace.frames import ALTERNATIVES, RecordLevel

if TYPE_CHECKING:
    from torch import Tensor

# What `NativeStep.kernels` names -> the operators that are meant.
_KERNELS = {"attention": (Attention, MLA), "router": (MoE, RoutedAttention), "experts": (MoE,)}


class NativeStep:
    """See `steps.Step`. `threads` is torch's number where it is not given."""

    draws = False

    def __init__(self, shared: Shared, *, threads: int = 0) -> None:
        import torch

        self.shared = shared
        self._threads = threads or torch.get_num_threads()
        self._isa = native.available()
        self._width = max((picks(shared, n) for n in range(len(shared.routers))), default=1)
        self._gates = np.zeros((len(shared.routers), native.GATES), np.uintp)
        self._kept: dict[Any, Tensor] = {}  # what the program points at, beside the weights
        self._step: _Handle | None = None
        self.kernels = self._describe()
        if shared.lanes:
            self.opened()

    @classmethod
    def why_not(cls, shared: Shared) -> str:
        """Why the step does not cover a decoder; "" where it does."""
        if not shared.device.startswith("cpu"):
            return f"device {shared.device}: native kernels are for CPUs"
        if os.environ.get("MOESCOPE_NATIVE") == "0":
            return "MOESCOPE_NATIVE=0"
        if native.library() is None:
            return "native kernels were not built"
        if not native.available():
            return f"MOESCOPE_ISA={os.environ.get('MOESCOPE_ISA')}: this CPU lacks it"
        if why := why_not_native(shared.spec):
            return why
        if not all(tensor.is_contiguous() for tensor in shared.weights.values()):
            return "weights are not contiguous"
        return ""

    def _describe(self) -> dict[str, str]:
        """What runs where, as a trace records it."""
        name, shared, router = self._isa, self.shared, 0
        if shared.dtype != "bfloat16":
            name = name.removesuffix("-bf16")  # which multiplies bfloat16 only
        here: list[type] = []
        beside: dict[str, None] = {}
        for _, branch in shared.spec.operators():
            kind = type(branch.operator)
            if why_beside(shared, branch.operator, router):
                beside[kind.__name__] = None
            else:
                here.append(kind)
            router += kind in (MoE, RoutedAttention)
        kernels = {
            what: f"native {name}".removesuffix(f" {name}" * (what == "router"))
            if any(issubclass(kind, kinds) for kind in here)
            else "torch"
            for what, kinds in _KERNELS.items()
        }
        kernels["step"] = f"native: {name}, {self._threads} threads"
        if beside:
            kernels["step"] += f"; in torch: {', '.join(beside)}"
        return kernels

    def opened(self) -> None:
        """Write the program again, with the addresses of the caches, and room for all lanes."""
        shared, lanes = self.shared, self.shared.lanes
        self._pool = native.pool(self._threads)
        self._process = os.getpid()
        program = Program(shared, self._gates, self._kept, self._threads)
        ops, widths = program.ops(), np.array([*program.widths.values()], np.int32)
        self._step = _Handle(
            self._pool.library,
            self._pool.library.mk_step_create(
                *(self._pool.handle, self._isa.encode(), native.DTYPES.index(shared.dtype)),
                *(ops.ctypes.data, len(ops), widths.ctypes.data, len(widths)),
                *(lanes, shared.capacity, self._width),
            ),
        )
        self._parts = [*pairwise((0, *(beside.at for beside in program.besides), len(ops)))]
        self._besides = program.besides
        self._buffers = {
            buffer: self._step.buffer(buffer, lanes)
            for beside in program.besides
            for buffer in (beside.place.h, beside.place.read, beside.place.y, beside.logits)
            if buffer >= 0
        }
        self._lanes, self._starts = np.zeros((2, lanes), np.int32)
        self._ids = np.zeros(lanes, np.int64)
        self._answers = native.Answers(lanes, min(ALTERNATIVES, shared.spec.vocab_size))
        self._version = -1

    def _take_policies(self) -> None:
        """Copy the table of policies, make the gates it asks for, and room for its routings."""
        shared, policies = self.shared, self.shared.policies
        self._rows = np.ascontiguousarray(policies.rows)
        lanes, places, L, _ = self._rows.shape
        for router, bits in np.ndindex(L, native.GATES):
            asked = (self._rows[:, :, router, COLUMN["gate"]] == bits).any()
            if bits and asked and (router, 0) in self._kept:
                self._gates[router, bits] = self._rounded_gate(router, bits)
        self._most = [max((spec.K for spec in specs), default=0) for specs in policies.specs]
        self._most_shadow = max((s.K for specs in policies.shadows for s in specs), default=0)
        E = max((router.spec.E for router in shared.routers), default=0)
        shape = (lanes, places, L)
        self._expert_ids = np.full((*shape, self._width), -1, np.int32)
        self._runner_up = np.full(shape, -1, np.int32)
        self._scores, self._weights = np.zeros((2, *shape, self._width), np.float32)
        self._scalars = np.zeros((*shape, 4), np.float32)
        self._record = native.Record(
            *(self._rows.ctypes.data, places, L, self._width, E),
            *(self._expert_ids.ctypes.data, self._runner_up.ctypes.data),
            *(self._scores.ctypes.data, self._weights.ctypes.data),
            *(self._scalars.ctypes.data, 0, 0, None, None),
        )
        self._addresses = (
            *(array.ctypes.data for array in (self._lanes, self._starts, self._ids)),
            ctypes.addressof(self._record),
        )
        self._version = policies.version

    def _rounded_gate(self, router: int, bits: int) -> int:
        """The address of a gate's copy, rounded as `TorchMoE` rounds it."""
        from moescope.engine.torch_operators import rounded_gate

        if (router, bits) not in self._kept:
            self._kept[router, bits] = rounded_gate(self._kept[router, 0], bits).contiguous()
        return self._kept[router, bits].data_ptr()

    def __call__(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """Feed one token to each lane; the caller draws the next ones."""
        pool = self._pool
        with pool.lock:
            if os.getpid() != self._process:
                self.opened()
            if self._version != self.shared.policies.version:
                self._take_policies()
            N, asked = len(lanes), self._record
            self._lanes[:N], self._starts[:N], self._ids[:N] = lanes, starts, token_ids
            logits = np.empty((N, 1, self.shared.spec.vocab_size), np.float32)
            K = max(map(self._most.__getitem__, lanes))
            kept = Kept.empty((N, 1), asked.routers, K, asked.logits_width, record)
            asked.level, asked.picks = LEVELS.index(record), K
            asked.floats, asked.ints = kept.addresses()
            into = logits.ctypes.data, ctypes.addressof(self._answers.struct)
            invalid = self._run(lanes, starts, record, into)
            return self._output(logits, kept, invalid)

    def _run(
        self, lanes: tuple[int, ...], starts: tuple[int, ...], record: RecordLevel, into: Any
    ) -> int:
        """The parts of the program, and what torch does between them."""
        assert self._step is not None
        N, call, invalid = len(lanes), None, -1
        if self._besides:
            ids = self._ids[:N, None].copy()
            assert self.shared.prepare is not None
            call = self.shared.prepare(lanes, ids, keep_logits=record == "logits")
        for number, part in enumerate(self._parts):
            invalid = self._step.run(*part, N, *self._addresses, *into)
            if number < len(self._besides):
                self._beside(self._besides[number], N, call)
        return invalid

    def _beside(self, beside: Beside, N: int, call: Any) -> None:
        """One operator in torch, on rows of the program's buffers."""
        place, H = beside.place, self.shared.spec.hidden
        dtype = self.shared.weights["embed.weight"].dtype
        h, read = (self._buffers[at][:N, :H].to(dtype, copy=True) for at in (place.h, place.read))
        call.read = read
        self._buffers[place.y][:N, :H] = self.shared.operators[place.number](h, call)
        if beside.logits >= 0:
            self._take_routing(place.router, self._buffers[beside.logits][:N], call)

    def _take_routing(self, router: int, logits: Tensor, call: Any) -> None:
        """What a router in torch decided last, for its shadows too, where those in C write it."""
        N, own = len(logits), call.routings[-1]
        shadows = call.shadow_routings[-1] if call.shadow_routings else []
        for place, routing in enumerate((own, *shadows)):
            at = (slice(N), place, router)
            K = routing.expert_ids.shape[1]
            for into, fill, name in (
                (self._expert_ids, -1, "expert_ids"),
                (self._scores, 0.0, "scores"),
                (self._weights, 0.0, "weights"),
            ):
                into[at] = fill
                into[at][:, :K] = getattr(routing, name).numpy()
            self._runner_up[at] = routing.runner_up.numpy()
            sums = (routing.score_sum, routing.mass, routing.entropy, routing.margin)
            self._scalars[at] = np.stack([values.numpy() for values in sums], -1)
        if own.logits is not None:
            logits[:, : own.logits.shape[1]] = own.logits

    def _output(self, logits: NDArray[np.float32], kept: Kept, invalid: int) -> StepOutput:
        """What was written, [N, T = 1, L, ...]; shadows are copies, [N, 1, S, L, ...]."""
        N, wanted = len(logits), kept.level != "ids"
        shadows, most = self._expert_ids.shape[1] > 1, self._most_shadow
        return StepOutput(
            logits=logits,
            **kept.fields(),
            invalid_router=None if invalid < 0 else invalid,
            expected=[[found] for found in expectations_of(logits[:, 0], self._answers)],
            kept=kept,
            shadow_ids=(
                self._expert_ids[:N, None, 1:, :, :most].astype(np.int16) if shadows else None
            ),
            shadow_weights=(
                self._weights[:N, None, 1:, :, :most].copy() if shadows and wanted else None
            ),
            shadow_sums=self._scalars[:N, None, 1:, :, 0].copy() if shadows else None,
        )


class _Handle:
    """A step of the library, freed with this object."""

    def __init__(self, library: Any, address: int | None) -> None:
        if not address:
            raise MemoryError("no memory for the buffers of a step")
        self.address, self._library = address, library
        weakref.finalize(self, library.mk_step_destroy, address)

    def run(self, *arguments: Any) -> int:
        return int(self._library.mk_step_run(self.address, *arguments))

    def buffer(self, number: int, lanes: int) -> Tensor:
        """The rows of a buffer [lanes, stride] float32, as long as this object lives."""
        import torch

        stride = ctypes.c_int64()
        at = self._library.mk_step_buffer(self.address, number, ctypes.byref(stride))
        held = (ctypes.c_float * (lanes * stride.value)).from_address(at)
        return torch.from_numpy(np.ctypeslib.as_array(held).reshape(lanes, stride.value))
