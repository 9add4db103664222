"""The fused step for CUDA: one token of each of N lanes in one graph, and the next one under way.

`graph_layers` says what runs, `graph_slots` where it reads and writes. This module captures it, one
graph for each number of lanes, of shadow variants, for records with or without logits, and way of
drawing; replays it; and runs ahead: the device draws the next token itself and its step starts
before the host has seen it. A step that was not wanted is forgotten: its rows of the cache lie
behind the ends of the lanes. Where operators write over their state, nothing runs ahead. Policies
are data: no toggle captures anything again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.engine import graph_layers, sampling
from moescope.engine.graph_layers import Layers
from moescope.engine.graph_slots import SLOTS, Buffers, joined
from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.steps import Shared
from moescope.errors import MoescopeError
from moescope.trace.frames import RecordLevel

REACH = 256  # positions at least, so that short lanes share a graph
Drawing = Literal["greedy", "plain", "ranked"]  # ranked: some lane has a top-k or a top-p


@dataclass(frozen=True, slots=True)
class Kind:
    """What a graph is captured for."""

    lanes: int
    shadows: int
    logits: bool  # of the routers, in the record
    drawing: Drawing
    reach: int  # positions that operators in torch look at, where there are such


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step under way: what it was given and where its output arrives."""

    kind: Kind
    slot: int
    lanes: tuple[int, ...]
    starts: tuple[int, ...]
    draws: tuple[Draw, ...] | None
    state: tuple[int, int]  # versions of policies and caches


class GraphStep:
    """See `steps.Step`. `graph` False launches the same kernels one by one; `pdl` lets a kernel
    begin to read weights while the one before it runs (CUDA devices of compute capability 9.0 and
    above). `captures` counts what was captured, `launches` the steps that ran, wanted or not."""

    draws = True

    def __init__(
        self, shared: Shared, *, graph: bool = True, run_ahead: bool = True, pdl: bool = False
    ) -> None:
        self.shared, self.graph = shared, graph
        self.layers = Layers(shared, pdl=pdl)
        self.run_ahead = run_ahead and not self.layers.recurrent()
        self.kernels = self.layers.kernels()
        self.captures = self.launches = 0
        self._buffers: dict[tuple[int, int, bool], Buffers] = {}
        self._graphs: dict[Kind, list[torch.cuda.CUDAGraph]] = {}
        self._pool: Any = None
        self._copies: torch.cuda.Stream | None = None
        self._ahead: Launched | None = None
        self._drawn: NDArray[np.int64] | None = None  # what the last output was followed by
        if shared.device != "cpu":
            self._copies = torch.cuda.Stream(shared.device)  # type: ignore[no-untyped-call]

    @staticmethod
    def why_not(shared: Shared) -> str:
        """ "" where this step covers the decoder, else what it has no fused form for."""
        return graph_layers.why_not(shared)

    def opened(self) -> None:
        """Caches moved: everything captured is void."""
        self._forget_graphs()
        self._ahead = None
        self._buffers.clear()

    def _forget_graphs(self) -> None:
        """Once none of them runs."""
        if self.shared.device != "cpu":
            torch.cuda.synchronize(self.shared.device)
        self._graphs.clear()

    @torch.inference_mode()
    def __call__(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """See `steps.Step`. More lanes than the kernels take go in parts, without running ahead."""
        with nullcontext() if self._copies is None else torch.cuda.device(self.shared.device):
            if len(lanes) > graph_layers.LANES:
                return self._in_parts(lanes, starts, token_ids, record, draws)
            known = None if draws is None else tuple(draws)
            return self._step(lanes, starts, token_ids, record, known)

    def _step(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: tuple[Draw, ...] | None,
    ) -> StepOutput:
        launched = self._found(lanes, starts, token_ids, record, draws)
        self._ahead = None
        if launched is None:
            launched = self._begin(lanes, starts, token_ids, record, draws)
        if self.run_ahead and draws is not None:
            self._ahead = self._go_on(launched)
        output = self._of(launched.kind).output(launched.slot, lanes, record, draws is not None)
        self._drawn = output.drawn
        return output

    def _in_parts(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: Sequence[Draw] | None,
    ) -> StepOutput:
        ahead, self.run_ahead = self.run_ahead, False
        try:
            parts = [
                slice(n, n + graph_layers.LANES) for n in range(0, len(lanes), graph_layers.LANES)
            ]
            outs = [
                self(lanes[p], starts[p], token_ids[p], record, draws and draws[p]) for p in parts
            ]
        finally:
            self.run_ahead = ahead
        return joined(outs)

    # --- running ahead ----------------------------------------------------------------------------

    def _found(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: tuple[Draw, ...] | None,
    ) -> Launched | None:
        """The step that ran ahead, where it is the one asked for."""
        ahead = self._ahead
        if ahead is None or self._drawn is None:
            return None
        same = (
            (ahead.lanes, ahead.starts, ahead.state) == (lanes, starts, self._state())
            and np.array_equal(self._drawn, token_ids)
            and (ahead.kind.logits or record != "logits")
            and (draws is None or _alike(draws, ahead.draws))
        )
        return ahead if same else None

    def _go_on(self, last: Launched) -> Launched | None:
        """Start the step after `last` on what that one draws, if there is room."""
        starts = tuple(start + 1 for start in last.starts)
        if last.draws is None or max(starts) >= self.shared.capacity:
            return None
        if 0 < last.kind.reach <= max(starts):
            return None
        draws = tuple(_following(draw) for draw in last.draws)
        if last.kind.drawing != "greedy":
            self._of(last.kind).write_sampling(draws)
        return self._launch(replace(last, starts=starts, draws=draws))

    def _state(self) -> tuple[int, int]:
        return self.shared.policies.version, self.shared.edits

    # --- launching --------------------------------------------------------------------------------

    def _begin(
        self,
        lanes: tuple[int, ...],
        starts: tuple[int, ...],
        token_ids: NDArray[np.int64],
        record: RecordLevel,
        draws: tuple[Draw, ...] | None,
    ) -> Launched:
        shadows = len(self.shared.policies.shadows)
        if shadows > graph_layers.SHADOWS:
            raise MoescopeError(f"shadow variants: at most {graph_layers.SHADOWS} on a GPU")
        kind = Kind(
            len(lanes), shadows, record == "logits", _drawing(draws), self._reach(max(starts))
        )
        buffers = self._of(kind)
        if self.layers.hold_gates(self.shared.policies):
            self._forget_graphs()
        buffers.write_policies(lanes, self.layers.gates)
        if draws is not None and kind.drawing != "greedy":
            buffers.write_sampling(draws)
        inputs = {"token_ids": token_ids, "positions": starts, "lanes": lanes}
        if self.graph and kind not in self._graphs:
            buffers.inputs.send(inputs)
            self._graphs[kind] = self._capture(kind, lanes)
            self.captures += 1
        buffers.inputs.send(inputs)
        return self._launch(Launched(kind, 0, lanes, starts, draws, self._state()))

    def _launch(self, launched: Launched) -> Launched:
        buffers = self._of(launched.kind)
        slot = buffers.turn
        buffers.turn = (slot + 1) % SLOTS
        buffers.slots[slot].keep_until_fetched()
        if self.graph:
            self._graphs[launched.kind][slot].replay()
        else:
            self._forward(launched.kind, slot)
        buffers.slots[slot].fetch(self._copies)
        self.launches += 1
        return replace(launched, slot=slot)

    def _reach(self, position: int) -> int:
        """A power of two above the position, at most the capacity; 0 where nobody asks."""
        if not self.layers.reaches():
            return 0
        return min(self.shared.capacity, max(REACH, 1 << position.bit_length()))

    def _of(self, kind: Kind) -> Buffers:
        key = kind.lanes, kind.shadows, kind.logits
        if key not in self._buffers:
            self._buffers[key] = Buffers(self.shared, *key)
        return self._buffers[key]

    def _forward(self, kind: Kind, slot: int) -> None:
        buffers = self._of(kind)
        self.layers.run(buffers, buffers.slots[slot].device, kind.drawing, kind.reach)

    def _capture(self, kind: Kind, lanes: tuple[int, ...]) -> list[torch.cuda.CUDAGraph]:
        """One graph a slot. Everything runs once before, because kernels compile and libraries
        allocate on first use, which a capture does not allow; state it wrote over is put back."""
        device = self.shared.device
        rewritten = [
            (run, lane, run.save(lane)) for run in self.layers.recurrent() for lane in lanes
        ]
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._forward(kind, 0)
        torch.cuda.current_stream(device).wait_stream(side)
        for run, lane, saved in rewritten:
            run.restore(lane, saved)
        torch.cuda.synchronize(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graphs = []
        for slot in range(SLOTS):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._forward(kind, slot)
            graphs.append(graph)
        return graphs


def _drawing(draws: Sequence[Draw] | None) -> Drawing:
    asked = [draw.sampling for draw in draws or () if draw.sampling.temperature > 0]
    if not asked:
        return "greedy"
    return "ranked" if any(s.top_k > 0 or s.top_p < 1 for s in asked) else "plain"


def _alike(draws: Sequence[Draw], others: Sequence[Draw] | None) -> bool:
    """Whether they draw the same; random numbers follow from the rest."""
    return others is not None and [(d.sampling, d.position) for d in draws] == [
        (d.sampling, d.position) for d in others
    ]


def _following(draw: Draw) -> Draw:
    """How the token after the one of `draw` will be drawn."""
    position, asked = draw.position + 1, draw.sampling
    return Draw(asked, position, sampling.uniform(asked.seed, position))
