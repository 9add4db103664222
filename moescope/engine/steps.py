"""The seam between the torch interpreter and a fused decode step: one token for each of N lanes.

`TorchDecoder` owns lanes, caches and prompts and can decode everything it accepts. Where a fused
step covers the decoder, it decodes instead, on the same weights and caches: `native_step` on a CPU
(one call of a C program), `graph_step` on CUDA (one graph). Both read policies from `Policies` at
run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.engine.decoder import DecoderSpec
from moescope.engine.interpreter import Draw, Router, StepOutput
from moescope.kernels.policy_rows import WIDTH, pack
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import RecordLevel

if TYPE_CHECKING:
    from torch import Tensor

STEPS = {
    "cpu": ("moescope.engine.native_step", "NativeStep"),
    "cuda": ("moescope.engine.graph_step", "GraphStep"),
}
K_LIMIT = 32  # picks a lane can ask for; buffers hold min(E, 32) of each router, or K if larger


class Policies:
    """Which router spec is in force: per lane and router, and shadow variants for all lanes.

    `rows` [lanes, 1 + S, L, WIDTH] float64 (see `kernels.policy_rows`): place 0 is the spec in
    force, the others are shadows. `version` grows with every change, so that a device copies the
    table only then. `specs[lane][router]` and `shadows[s][router]` are the same as specs.
    """

    def __init__(self, trained: Sequence[RouterSpec]) -> None:
        self.trained = tuple(trained)
        self.specs: list[tuple[RouterSpec, ...]] = []
        self.shadows: tuple[tuple[RouterSpec, ...], ...] = ()
        self.version = 0
        self.rows: NDArray[np.float64] = np.zeros((0, 1, len(self.trained), WIDTH))
        self._packed: dict[RouterSpec, NDArray[np.float64]] = {}

    def open(self, lanes: int) -> None:
        """Room for `lanes` lanes; new ones route as trained."""
        self.specs += [self.trained] * (lanes - len(self.specs))
        self._write()

    def set(self, lane: int, specs: Sequence[RouterSpec]) -> None:
        self.specs[lane] = tuple(specs)
        self._write()

    def set_shadows(self, shadows: Sequence[Sequence[RouterSpec]]) -> None:
        self.shadows = tuple(tuple(specs) for specs in shadows)
        self._write()

    def _write(self) -> None:
        self.rows = np.zeros((len(self.specs), 1 + len(self.shadows), len(self.trained), WIDTH))
        for lane, specs in enumerate(self.specs):
            for place, chosen in enumerate((specs, *self.shadows)):
                for router, spec in enumerate(chosen):
                    self.rows[lane, place, router] = self._row(spec)
        self.version += 1

    def _row(self, spec: RouterSpec) -> NDArray[np.float64]:
        """The gate's column holds the bits its weight is rounded to; steps give them a place."""
        if spec not in self._packed:
            self._packed[spec] = pack(spec, gate=spec.policy.gate_quant_bits)
        return self._packed[spec]


@dataclass(slots=True, eq=False)
class Shared:
    """What prompts and steps share. Attentions are counted in execution order."""

    spec: DecoderSpec  # dtypes resolved
    weights: Mapping[str, Tensor]  # the tensors of `parameters.slots(spec)` by name
    device: str
    dtype: str  # of weights, activations and caches
    routers: tuple[Router, ...]
    policies: Policies
    lanes: int = 0
    capacity: int = 0
    caches: list[Tensor] = field(default_factory=list)  # [2, lanes, kv heads, capacity, head dim]
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # attention -> cos and signed sin [capacity, head dim], in the dtype they are applied in
    operators: tuple[Any, ...] = ()  # the running torch operators, in execution order
    # what a call of them takes: of lanes, their tokens [N, 1], and whether logits are kept
    prepare: Callable[..., Any] | None = None
    head: Tensor | None = None  # the output's weight, as it is multiplied
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # id of a rope -> the same of every rope; where it switches, [2 × capacity, dims]
    edits: int = 0  # grows when a lane changes other than by a step: copied, or given a prompt


class Step(Protocol):
    """A fused decode step. What it computes must agree with the torch operators: same ids and
    tokens in float32, same rounding points in bfloat16."""

    # operator -> kernel and its configuration, as the trace records it; the first word of "step"
    # is what the status line calls this path
    kernels: dict[str, str]
    draws: bool  # whether it draws the next tokens

    def opened(self) -> None:
        """Caches were allocated anew or lanes added: take their addresses again."""

    def __call__(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],  # positions the tokens stand at
        token_ids: NDArray[np.int64],  # [N], checked
        record: RecordLevel,
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """Feed one token to each lane and write its keys and values; lengths are the caller's."""


def fused_step(shared: Shared) -> tuple[Step | None, str]:
    """The fused step for a decoder, or None and why there is none."""
    place, name = STEPS["cpu" if shared.device.startswith("cpu") else "cuda"]
    try:
        kind = getattr(import_module(place), name)
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    why = kind.why_not(shared)
    return (None, why) if why else (kind(shared), "")
