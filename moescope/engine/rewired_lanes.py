"""Lanes that run under a rewired decoder, beside lanes that run as the model was loaded.

One interpreter over several decoders that share weights and state: only operators with a router are
built anew, so that a lane keeps its past whatever variant it turns to, and forks as ever. Lanes
under a rewired decoder take no fused step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.operators import MoE, RoutedAttention
from moescope.engine.outputs import in_order, merged
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from moescope.trace.frames import RecordLevel
from moescope.variants import parse

# What a rewired decoder has of its own; everything else it shares with the loaded one.
OWN = ("spec", "routers", "policies", "_interned")


def rewirable(interpreter: Any, expression: str) -> Any:
    """`interpreter`, or one around it that can run a lane under a variant that rewires the decoder.
    Raises `MoescopeError` where that is not possible."""
    if not parse(expression).rebuilds or hasattr(interpreter, "set_wiring"):
        return interpreter
    return RewiredLanes(interpreter)


class RewiredLanes:
    """An `Interpreter` over `base`, a `TorchDecoder`; asks it for everything but this."""

    expects = False  # `run` takes no `next_ids`: all logits of a prompt are kept

    def __init__(self, base: Any) -> None:
        if not hasattr(base, "operators"):
            raise MoescopeError(
                f"device {base.device}: a variant that rewires the decoder needs torch",
                hint="--device cpu, with torch installed",
            )
        self.base = base
        self._decoders: dict[str, Any] = {}  # by expression
        self._of: dict[int, str] = {}  # lane -> expression, where it is rewired
        self._shadows: Sequence[Sequence[RouterPolicy]] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    @property
    def draws(self) -> bool:
        return bool(self.base.draws and not self._of)

    def set_wiring(self, lane: int, expression: str) -> None:
        """From the next call on, `lane` runs as `expression` says, policies included; one that
        rewires nothing brings it back."""
        if not parse(expression).rebuilds:
            self._of.pop(lane, None)
            return
        if expression not in self._decoders:
            self._decoders[expression] = self._built(expression)
        self._of[lane] = expression

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        self.base.set_shadows(policies)
        self._shadows = policies
        for decoder in self._decoders.values():
            decoder.set_shadows(policies)

    def truncate(self, lane: int, length: int) -> None:
        self._decoder(lane).truncate(lane, length)

    def copy(self, source: int, target: int, length: int) -> None:
        self._decoder(source).copy(source, target, length)

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """See `Interpreter.run`: lanes of one decoder together, put in order again."""
        groups: dict[str, list[int]] = {}
        for row, lane in enumerate(lanes):
            groups.setdefault(self._of.get(lane, ""), []).append(row)
        if list(groups) == [""]:
            out: StepOutput = self.base.run(
                lanes, token_ids, all_logits=all_logits, record=record, draws=draws
            )
            return out

        outs = []
        for rows in groups.values():
            decoder, some = self._decoder(lanes[rows[0]]), [lanes[row] for row in rows]
            found = decoder.run(some, token_ids[rows], all_logits=all_logits, record=record)
            outs.append(replace(found, expected=None, kept=None))
        self.base.shared.edits += 1  # lanes grew beside the fused step
        order = [row for rows in groups.values() for row in rows]
        return in_order(outs[0] if len(outs) == 1 else merged(outs), order)

    def _decoder(self, lane: int) -> Any:
        expression = self._of.get(lane)
        if expression is None:
            return self.base
        decoder = self._decoders[expression]
        for name, value in vars(self.base).items():  # what was allocated anew since
            if name not in (*OWN, "_stages", "_groups", "step", "draws", "kernels"):
                setattr(decoder, name, value)
        decoder.policies.open(len(self.base._lengths))
        return decoder

    def _built(self, expression: str) -> Any:
        from moescope.engine.rewire import rewired

        base = self.base
        if any(isinstance(b.operator, RoutedAttention) for _, b in base.spec.operators()):
            raise MoescopeError(
                f"{expression}: attention that is routed cannot be rewired while it runs",
                hint="moescope diagnose tries such variants on a trace",
            )
        made, decoder = rewired(base, parse(expression)), copy.copy(base)
        for name in OWN:
            setattr(decoder, name, getattr(made, name))
        decoder._stages = [
            replace(stage, branches=branches) for stage, branches in _branches(base, made)
        ]
        decoder._groups, decoder.step, decoder.draws = {}, None, False
        decoder.kernels = dict(base.kernels, step="torch: a rewired decoder")
        if self._shadows:
            decoder.set_shadows(self._shadows)
        return decoder


def _branches(base: Any, made: Any) -> list[tuple[Any, list[Any]]]:
    """Stages of `base` with the routed operators of `made`."""
    return [
        (
            theirs,
            [
                new if isinstance(new[3].operator, MoE) else old
                for old, new in zip(theirs.branches, ours.branches, strict=True)
            ],
        )
        for theirs, ours in zip(base._stages, made._stages, strict=True)
    ]
