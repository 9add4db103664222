"""What a fused step on a device reads and leaves behind, at addresses that never change.

A slot is one block of memory with everything a step says: what every router decided, next-token
logits and drawn tokens. So the host gets it in one copy, into a block of its own that lives as long
as the slot. Two slots take turns, so that a step can run while the one before it is copied.
Letters: N lanes, P policies (1 + S shadows), L routers, K picked, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.steps import K_LIMIT, Shared
from moescope.kernels.policy_rows import COLUMN, WIDTH
from moescope.kernels.spec import RouterSpec, Routing
from moescope.trace.frames import RecordLevel

ALIGNMENT = 256  # bytes; what torch's allocator gives
SLOTS = 2
PICKS = ("expert_ids", "scores", "weights")
SUMS = ("score_sum", "mass", "entropy", "margin")
FILTERS = ("temperature", "top_k", "top_p", "min_p")
GATE, OUTPUT_SCALE = COLUMN["gate"], COLUMN["output_scale"]

Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Block:
    """Tensors of `fields` in one piece of memory on a device, and in one on the host."""

    def __init__(self, fields: Fields, device: str) -> None:
        parts: dict[str, slice] = {}
        size = 0
        for name, (shape, dtype) in fields.items():
            parts[name] = slice(size, size + prod(shape) * dtype.itemsize)
            size = -(-parts[name].stop // ALIGNMENT) * ALIGNMENT
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._copied: torch.cuda.Event | None = None  # the last copy to or from the host
        if device == "cpu":
            self._on_host = self._memory
        else:
            self._on_host = torch.zeros(size, dtype=torch.uint8).pin_memory()
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.device: dict[str, Tensor] = {}
        self.host: dict[str, NDArray[Any]] = {}  # read only after `wait`
        for name, (shape, dtype) in fields.items():
            self.device[name] = self._memory[parts[name]].view(dtype).view(shape)
            self.host[name] = self._on_host[parts[name]].view(dtype).view(shape).numpy()

    def wait(self) -> None:
        """Until the last copy is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, values: Mapping[str, Any]) -> None:
        """Give all fields their values, once everything queued before is done; does not wait."""
        self.wait()  # for the last copy out of this host memory, long done
        for name, array in self.host.items():
            array[...] = values[name]
        if self._copied is not None:
            self._memory.copy_(self._on_host, non_blocking=True)
            self._copied.record()

    def fetch(self, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy everything to the host on `stream`, after what is queued now."""
        if self._copied is None:
            return
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._on_host.copy_(self._memory, non_blocking=True)
            self._copied.record(stream)

    def keep_until_fetched(self) -> None:
        """What is queued from now on does not write here before the last `fetch` is done."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def picks(shared: Shared) -> int:
    """K of the buffers: of the router that can be asked for most."""
    return max(max(r.spec.K, min(r.spec.E, K_LIMIT)) for r in shared.routers)


class Buffers:
    """Inputs and slots of steps with N lanes and S shadow variants, with or without the routers'
    logits in the slots. `row_of` [N, P] of each router says which of `rows` [N × P × L, WIDTH] it
    routes each lane under, and `output_scales` [N] what its experts' sum is multiplied by.

    What a router reads or writes begins at a multiple of 16 bytes: else Triton would compile its
    kernels once for routers where it does and once for the others.
    """

    def __init__(self, shared: Shared, lanes: int, shadows: int, logits: bool) -> None:
        self.shared, self.lanes, self.places, self.logits = shared, lanes, 1 + shadows, logits
        L, N, P, device = len(shared.routers), lanes, self.places, shared.device
        self.K = picks(shared)
        self.widest = max(router.spec.E for router in shared.routers)
        integers = {"token_ids": torch.int64, "positions": torch.int32, "lanes": torch.int32}
        self.inputs = Block({name: ((N,), kind) for name, kind in integers.items()}, device)
        self.sampling = Block(
            {name: ((N, 1), torch.float64) for name in (*FILTERS, "uniform")}, device
        )
        self.rows = torch.zeros(N * P * L, WIDTH, dtype=torch.float32, device=device)
        row_of = torch.zeros(L, _aligned(N * P), dtype=torch.int32, device=device)
        places = torch.arange(N * P * L, dtype=torch.int32, device=device).view(N * P, L)
        row_of[:, : N * P] = places.T
        self.row_of = [row[: N * P].view(N, P) for row in row_of]
        self._scales = torch.ones(L, _aligned(N), dtype=torch.float32, device=device)
        self.output_scales = [row[:N] for row in self._scales]
        self._policies: tuple[Any, ...] = ()  # what `rows` was written for
        real, whole = torch.float32, torch.int32
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((L, _aligned(N * P * self.K)), whole if name == "expert_ids" else real)
            for name in PICKS
        }
        fields |= {name: ((L, _aligned(N * P)), real) for name in SUMS}
        fields["runner_up"] = ((L, _aligned(N * P)), whole)
        fields["drawn"] = ((N,), torch.int64)
        fields["logits"] = ((N, shared.spec.vocab_size), real)
        if logits:
            fields["router_logits"] = ((L, _aligned(N * self.widest)), real)
        self.slots = [Block(fields, device) for _ in range(SLOTS)]
        self.turn = 0

    def routing(self, slot: Mapping[str, Tensor], number: int) -> Routing:
        """A router's place in the device memory of a slot."""
        N, P, K, E = self.lanes, self.places, self.K, self.shared.routers[number].spec.E
        shapes = {name: (N, P, K) for name in PICKS} | {name: (N, P) for name in SUMS}
        shapes |= {"runner_up": (N, P)} | ({"router_logits": (N, E)} if self.logits else {})
        arrays = {
            name: slot[name][number, : prod(shape)].view(shape) for name, shape in shapes.items()
        }
        logits = arrays.pop("router_logits", None)
        return Routing(**arrays, logits=logits)

    def write_policies(self, lanes: tuple[int, ...], gates: Mapping[int, int]) -> None:
        """Bring `rows` up to date for `lanes`; `gates` says which gate holds how many bits."""
        policies = self.shared.policies
        wanted = policies.version, lanes, tuple(gates.items())
        if wanted != self._policies:
            table = policies.rows[list(lanes)].reshape(-1, WIDTH).astype(np.float32)
            table[:, GATE] = [gates[int(bits)] for bits in table[:, GATE]]
            self.rows.copy_(torch.from_numpy(table))
            scales = table[:, OUTPUT_SCALE].reshape(self.lanes, self.places, -1)[:, 0].T
            self._scales[:, : self.lanes] = torch.from_numpy(scales.copy()).to(self._scales.device)
            self._policies = wanted

    def write_sampling(self, draws: Sequence[Draw]) -> None:
        self.sampling.send(
            {name: [[getattr(draw.sampling, name)] for draw in draws] for name in FILTERS}
            | {"uniform": [[draw.uniform] for draw in draws]}
        )

    def output(
        self, slot: int, lanes: tuple[int, ...], record: RecordLevel, drawn: bool
    ) -> StepOutput:
        """What the step in `slot` said, once it has arrived, in arrays of its own."""
        block, policies = self.slots[slot], self.shared.policies
        block.wait()
        host, wanted = self._arrived(block.host), record != "ids"
        K = _most(policies.specs[lane] for lane in lanes)
        ids = host["expert_ids"][:, :, 0, :K]
        invalid = (ids[..., 0] < 0).any(axis=1)
        sums: dict[str, Any] = {n: _by_lane(host[n][:, :, 0], np.float32) for n in SUMS}
        return StepOutput(
            logits=host["logits"][:, None].copy(),
            expert_ids=_by_lane(ids, np.int16),
            **sums,
            runner_up=_by_lane(host["runner_up"][:, :, 0], np.int16),
            weights=_by_lane(host["weights"][:, :, 0, :K], np.float32) if wanted else None,
            scores=_by_lane(host["scores"][:, :, 0, :K], np.float32) if wanted else None,
            router_logits=self._router_logits(host) if record == "logits" else None,
            invalid_router=int(invalid.argmax()) if invalid.any() else None,
            drawn=host["drawn"].copy() if drawn else None,
            **(self._shadows(host, wanted) if self.places > 1 else {}),
        )

    def _arrived(self, host: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """[L, N, P, K] and [L, N, P] without what aligns them."""
        N, P, K = self.lanes, self.places, self.K
        picks = {name: host[name][:, : N * P * K].reshape(-1, N, P, K) for name in PICKS}
        rows = {n: host[n][:, : N * P].reshape(-1, N, P) for n in (*SUMS, "runner_up")}
        return {**host, **picks, **rows}

    def _shadows(self, host: Mapping[str, NDArray[Any]], wanted: bool) -> dict[str, Any]:
        """[N, 1, S, L, ...]"""
        K = _most(self.shared.policies.shadows)

        def of(name: str, dtype: Any) -> NDArray[Any]:
            array = host[name][:, :, 1:]
            return _by_lane(array[..., :K] if array.ndim == 4 else array, dtype).swapaxes(2, 3)

        return {
            "shadow_ids": of("expert_ids", np.int16),
            "shadow_weights": of("weights", np.float32) if wanted else None,
            "shadow_sums": of("score_sum", np.float32),
        }

    def _router_logits(self, host: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """[N, 1, L, E]; a router of fewer classes ends in NaN."""
        routers = self.shared.routers
        out = np.full((self.lanes, 1, len(routers), self.widest), np.nan, np.float32)
        for place, router in enumerate(routers):
            E = router.spec.E
            flat = host["router_logits"][place, : self.lanes * E]
            out[:, 0, place, :E] = flat.reshape(self.lanes, E)
        return out


def joined(outs: Sequence[StepOutput]) -> StepOutput:
    """Outputs of some lanes each as one; K is that of the lane with the most."""
    arrays: dict[str, Any] = {}
    for name in (field.name for field in fields(StepOutput)):
        parts = [getattr(out, name) for out in outs]
        if not isinstance(parts[0], np.ndarray):
            continue
        widest = max(part.shape[-1] for part in parts)
        fill = -1 if parts[0].dtype == np.int16 else 0
        pads = [[(0, 0)] * (p.ndim - 1) + [(0, widest - p.shape[-1])] for p in parts]
        arrays[name] = np.concatenate(
            [
                np.pad(part, pad, constant_values=fill) if part.ndim > 1 else part
                for part, pad in zip(parts, pads, strict=True)
            ]
        )
    invalid = [out.invalid_router for out in outs if out.invalid_router is not None]
    return replace(outs[0], **arrays, invalid_router=min(invalid, default=None))


def _aligned(numbers: int) -> int:
    """Numbers of four bytes up to a multiple of 16 bytes."""
    return -(-numbers // 4) * 4


def _by_lane(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """[L, N, ...] -> [N, 1, L, ...]"""
    return array.swapaxes(0, 1)[:, None].astype(dtype)


def _most(specs: Iterable[Iterable[RouterSpec]]) -> int:
    """The largest K among specs of several lanes or variants."""
    return max(spec.K for row in specs for spec in row)
