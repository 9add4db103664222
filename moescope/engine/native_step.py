"""The decode step on a CPU as one call of the C library: `DecoderSpec` compiled into a program.

A program is an array of `mk_op` over buffers of rows (`native/moescope_kernels.h` says what each
does); it is written once per allocation of the caches. Policies, shadows and gate copies are read
at run time. Needs `kernels.native_ops`; nothing here computes.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.decoder import RESIDUAL, Branch, DecoderSpec
from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.kept import LEVELS, Kept
from moescope.engine.operators import MLP, Attention, MoE, Norm
from moescope.engine.sampling import expectations_of
from moescope.engine.steps import K_LIMIT, Shared
from moescope.kernels import native_ops as native
from moescope.kernels.policy_rows import COLUMN
from moescope.trace.frames import ALTERNATIVES, RecordLevel

if TYPE_CHECKING:
    from torch import Tensor

MOST_EXPERTS, MOST_PICKS = 4096, 64  # of `router.h`


class NativeStep:
    """See `steps.Step`. `threads` is torch's number where it is not given."""

    draws = False

    def __init__(self, shared: Shared, *, threads: int = 0) -> None:
        import torch

        self.shared = shared
        self._threads = threads or torch.get_num_threads()
        self._isa = native.available()
        self._width = max((_picks(shared, n) for n in range(len(shared.routers))), default=1)
        self._gates = np.zeros((len(shared.routers), native.GATES), np.uintp)
        self._kept: dict[Any, Tensor] = {}  # what the program points at, beside the weights
        self._step: _Handle | None = None
        name = self._isa
        if shared.dtype != "bfloat16":
            name = name.removesuffix("-bf16")  # which multiplies bfloat16 only
        self.kernels = {
            "step": f"native: {name}, {self._threads} threads",
            "attention": f"native {name}",
            "router": "native",
            "experts": f"native {name}",
        }
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
        for index, router in enumerate(shared.routers):
            policy, wiring = router.spec.policy, router.spec.wiring
            if policy.correction_bias != "none" or policy.per_expert_scale or wiring.hash_table:
                return "correction_bias, per_expert_scale, hash_table: no fused form"
            asked = wiring.router_dtype
            if asked not in ("float32", shared.dtype):
                return f"router_dtype {asked}: no fused form in a {shared.dtype} model"
            if router.spec.E > MOST_EXPERTS or _picks(shared, index) > MOST_PICKS:
                return f"num_experts {router.spec.E}, K {router.spec.K}: no fused form"
        if not all(tensor.is_contiguous() for tensor in shared.weights.values()):
            return "weights are not contiguous"
        return ""

    def opened(self) -> None:
        """Write the program again, with the addresses of the caches, and room for all lanes."""
        shared, lanes = self.shared, self.shared.lanes
        self._pool = native.pool(self._threads)
        self._process = os.getpid()
        program = _Program(shared, self._gates, self._kept)
        ops, widths = program.ops(), np.array([*program.widths.values()], np.int32)
        self._step = _Handle(
            self._pool.library,
            self._pool.library.mk_step_create(
                *(self._pool.handle, self._isa.encode(), native.DTYPES.index(shared.dtype)),
                *(ops.ctypes.data, len(ops), widths.ctypes.data, len(widths)),
                *(lanes, shared.capacity, self._width),
            ),
        )
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
            if bits and (self._rows[:, :, router, COLUMN["gate"]] == bits).any():
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
            assert self._step is not None
            into = logits.ctypes.data, ctypes.addressof(self._answers.struct)
            invalid = self._step.run(N, *self._addresses, *into)
            return self._output(logits, kept, invalid)

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
        self.address, self._run = address, library.mk_step_run
        weakref.finalize(self, library.mk_step_destroy, address)

    def run(self, *arguments: Any) -> int:
        return int(self._run(self.address, *arguments))


class _Program:
    """The operators of a decoder in execution order. Buffers are named here, numbered there."""

    def __init__(self, shared: Shared, gates: NDArray[np.uintp], kept: dict[Any, Tensor]) -> None:
        self.shared, self.gates, self.kept = shared, gates, kept
        self.widths: dict[str, int] = {}
        self._written: list[dict[str, Any]] = []
        self._routers = self._attentions = 0
        self._decoder(shared.spec)

    def ops(self) -> NDArray[Any]:
        """As the library reads them."""
        out = np.zeros(len(self._written), native.OP)
        for op, fields in zip(out, self._written, strict=True):
            for name, value in fields.items():
                op[name] = value
        return out

    def _add(self, kind: str, **fields: Any) -> None:
        self._written.append({"kind": native.KINDS.index(kind), **fields})

    def _buffer(self, name: str, width: int) -> int:
        """The number of a buffer, made wide enough."""
        self.widths[name] = max(width, self.widths.get(name, 0))
        return list(self.widths).index(name)

    def _address(self, name: str) -> int:
        """Of a weight; 0 where the decoder has none by that name."""
        tensor = self.shared.weights.get(name)
        return 0 if tensor is None else tensor.data_ptr()

    def _wide(self, name: str) -> int:
        """The address of a float32 copy of a small weight; 0 where there is none."""
        tensor = self.shared.weights.get(name)
        if tensor is None:
            return 0
        if name not in self.kept:
            self.kept[name] = tensor.float().contiguous()
        return self.kept[name].data_ptr()

    def _decoder(self, spec: DecoderSpec) -> None:
        H, x = spec.hidden, self._buffer(RESIDUAL, spec.hidden)
        self._add("embed", y=x, cols=H, weight=self._address("embed.weight"))
        for number, layer in enumerate(spec.layers):
            held = {RESIDUAL}
            for branch in layer.branches:
                self._branch(f"layers.{number}.{branch.name}", branch, held, H)
        if spec.final_norm is not None:
            x = self._norm(spec.final_norm, "final_norm.weight", x, self._buffer("normed", H))
        head = self._address("embed.weight" if spec.tied_head else "head.weight")
        self._add("head", x=x, rows=spec.vocab_size, cols=H, weight=head)
        self._add("expect", rows=spec.vocab_size)

    def _branch(self, path: str, branch: Branch, held: set[str], H: int) -> None:
        read = h = self._buffer(branch.reads, H)
        if branch.pre_norm is not None:
            normed = self._buffer("normed", H)
            h = self._norm(branch.pre_norm, f"{path}.pre_norm.weight", read, normed)
        y = self._buffer("output", H)
        match branch.operator:
            case Attention() as attention:
                self._attention(path, attention, h, y)
            case MLP() as mlp:
                self._mlp(path, mlp, h, y)
            case MoE() as moe:
                self._moe(path, moe, h, read, y)
            case other:
                raise AssertionError(f"{type(other).__name__} should have been refused")
        if branch.post_norm is not None:
            self._norm(branch.post_norm, f"{path}.post_norm.weight", y, y)
        first = 0 if branch.adds_to in held else native.FIRST
        target = self._buffer(branch.adds_to, H)
        self._add("add", x=y, y=target, cols=H, number=branch.multiplier, flags=first)
        held.add(branch.adds_to)

    def _norm(
        self,
        norm: Norm,
        weight: str,
        x: int,
        y: int,
        *,
        at: int = 0,
        groups: int = 1,
        eps: float | None = None,
        wide: bool | None = None,
    ) -> int:
        wide = norm.applies == "float32" if wide is None else wide
        self._add(
            "norm",
            x=x,
            y=y,
            cols=norm.width,
            at=at,
            groups=groups,
            eps=norm.eps if eps is None else eps,
            weight=self._wide(weight),
            flags=native.WIDE_NORM if wide else 0,
        )
        return y

    def _attention(self, path: str, a: Attention, h: int, y: int) -> None:
        shared, D, index = self.shared, a.head_dim, self._attentions
        self._attentions += 1
        rows = (a.heads + 2 * a.kv_heads) * D
        qkv, mixed = self._buffer("qkv", rows), self._buffer("mixed", a.heads * D)
        weight, bias = self._address(f"{path}.qkv.weight"), self._wide(f"{path}.qkv.bias")
        self._add("linear", x=h, y=qkv, rows=rows, cols=a.hidden, weight=weight, bias=bias)
        if a.qk_norm is not None:
            # per head, both have the first norm's epsilon and are rounded before the weight
            each = a.qk_norm_over == "per_head"
            says: dict[str, Any] = {"eps": a.qk_norm.eps, "wide": False} if each else {}
            for norm, name, at, heads in (
                (a.qk_norm, "q_norm", 0, a.heads),
                (a.kv_norm or a.qk_norm, "k_norm", a.heads * D, a.kv_heads),
            ):
                groups = heads if each else 1
                self._norm(norm, f"{path}.{name}.weight", qkv, qkv, at=at, groups=groups, **says)
        if a.clip_qkv is not None:
            self._add("clip", x=qkv, cols=rows, number=a.clip_qkv)
        cos = sin = 0
        wide = a.rope is not None and a.rope.applies == "float32"
        if a.rope is not None:
            cos, sin = (table.data_ptr() for table in shared.rotations[index])
        sizes = {"heads": a.heads, "kv_heads": a.kv_heads, "head_dim": D, "window": a.window}
        cache = shared.caches[index].data_ptr()
        flags = native.WIDE_ROPE if wide else 0
        self._add("place", x=qkv, cache=cache, cos=cos, sin=sin, flags=flags, **sizes)
        self._add("attend", x=qkv, cache=cache, number=a.scale, **sizes)
        self._add("merge", y=mixed, **sizes)
        weight, bias = self._address(f"{path}.o_proj.weight"), self._wide(f"{path}.o_proj.bias")
        self._add("linear", x=mixed, y=y, rows=a.hidden, cols=a.heads * D, weight=weight, bias=bias)

    def _mlp(self, path: str, m: MLP, h: int, y: int) -> None:
        inner = self._buffer("inner", m.width)
        weight = self._address(f"{path}.gate_up.weight")
        self._add(
            "linear", x=h, y=inner, rows=m.width, cols=m.hidden, weight=weight, flags=native.GLU
        )
        weight = self._address(f"{path}.down_proj.weight")
        self._add("linear", x=inner, y=y, rows=m.hidden, cols=m.width, weight=weight)

    def _moe(self, path: str, m: MoE, h: int, read: int, y: int) -> None:
        router, H = self._routers, m.hidden
        self._routers += 1
        spec = self.shared.routers[router].spec
        wiring, shared = spec.wiring, m.shared
        gate = self.kept[router, 0] = self.shared.weights[f"{path}.gate.weight"]
        self.gates[router, 0] = gate.data_ptr()
        beside: dict[str, Any] = {"router": router}
        if shared is not None:
            names = {"up": "gate_up", "down": "down_proj"}
            beside["shared_width"] = shared.width
            for part, name in names.items():
                beside[f"shared_{part}"] = self._address(f"{path}.shared_expert.{name}.weight")
            beside["shared_gate"] = self._address(f"{path}.shared_expert_gate.weight")
        self._add(
            "gate",
            x=read if wiring.router_input == "residual" else h,
            z=h,
            cols=H,
            classes=spec.E,
            logits_dtype=native.DTYPES.index(wiring.router_dtype),
            gates=self.gates[router].ctypes.data,
            **beside,
        )
        self._add("route", router=router, classes=spec.E)
        self._add(
            "experts",
            x=h,
            rows=m.experts.width,
            cols=H,
            experts=wiring.num_experts,
            weight=self._address(f"{path}.experts.gate_up"),
            flags=native.WEIGHT_FIRST if wiring.apply_router_weight_on_input else 0,
            router=router,
        )
        self._add(
            "down",
            rows=H,
            cols=m.experts.width,
            weight=self._address(f"{path}.experts.down"),
            **beside,
        )
        self._add("combine", y=y, rows=H, **beside)


def _picks(shared: Shared, router: int) -> int:
    """Experts a lane can be made to pick."""
    spec = shared.routers[router].spec
    return max(spec.K, min(spec.E, K_LIMIT))
