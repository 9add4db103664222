"""From a request to a running model: device and dtype chosen, memory checked, tensors filled.

Everything that can be wrong is found before the first tensor is read: headers, config, the place of
every tensor, and whether weights and cache fit. Tensors are then read one by one into their final
place (experts into one tensor per layer), so that little more than the weights is ever held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any

from moescope.engine import devices, families, parameters
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.decoder import DecoderSpec, state_bytes
from moescope.engine.families.family import Family
from moescope.engine.families.plans import Piece, Plan
from moescope.engine.protocol import Loading, LoadRequest
from moescope.engine.stored import router_words
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.engine.interpreter import Interpreter

Progress = Callable[[Loading], None]
Counted = Callable[[int], None]
SMALL = 1_000_000_000  # bytes of weights below which a CPU runs in float32
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_REPORT_SECONDS = 0.05
NOTES = 8  # about tensors, before they are only counted


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to run. `memory` is in bytes: weights, cache, needed, free, and peak while
    loading; `facts` is what a screen prints (`protocol.Loaded`)."""

    interpreter: Interpreter
    spec: DecoderSpec
    checkpoint: Checkpoint
    facts: dict[str, Any]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Inspected:
    """What can be said of a checkpoint without reading a weight."""

    checkpoint: Checkpoint
    family: Family
    spec: DecoderSpec  # dtypes resolved
    plan: Plan
    device: str
    dtype: str
    split: devices.Split | None  # where layers live, if on several devices
    memory: dict[str, int]
    facts: dict[str, Any]

    def notes(self) -> list[str]:
        """What a user should know, of the files, the config and the tensors."""
        of_config = families.notes(self.checkpoint.config)
        return [*self.checkpoint.notes, *of_config, *self.plan.notes()]

    def device_of(self, target: str) -> str:
        """The device of one of our tensors."""
        if self.split is None or not target.startswith("layers."):
            return self.device
        return self.split.layers[int(target.split(".")[1])]


def load_model(request: LoadRequest, progress: Progress = lambda event: None) -> LoadedModel:
    """Load `request.model` and open one lane of `request.max_context` tokens at most.

    Raises MoescopeError: CHECKPOINT for a file at fault or a model that is not supported, RESOURCES
    where weights and cache do not fit into free memory, USAGE for a device that is not there.
    """
    progress(Loading("checking", 0, 0, "config.json and the header of every shard"))
    found = inspect(request)
    try:
        check_memory(found)
        weights, notes = _reader(found.device)(found, progress)
    finally:
        found.checkpoint.close()
    progress(Loading("preparing", 0, 0, "cache and kernels"))
    interpreter = _interpreter(found, weights)
    interpreter.open(1, found.memory["cache_tokens"])
    found.facts["notes"] = [*found.notes(), *notes]
    found.facts["kernels"] = dict(interpreter.kernels)
    found.facts["router_twin"] = getattr(interpreter, "twin", "")
    return LoadedModel(interpreter, found.spec, found.checkpoint, found.facts, found.memory)


def inspect(request: LoadRequest) -> Inspected:
    """Check a checkpoint and compute the memory it needs; reads no weights. The caller closes
    `.checkpoint`."""
    named = devices.check_devices(request.devices) if request.devices else ()
    device = named[0] if named else devices.choose_device(request.device)
    checkpoint = Checkpoint.open(request.model)
    try:
        family = families.family_of(checkpoint.config)
        spec = families.build(checkpoint.config)
        plan = families.plan(checkpoint.config, spec, checkpoint.tensors)
        dtype = choose_dtype(request.dtype, device, checkpoint, plan)
        spec = families.resolved(spec, dtype)
        held = weights_bytes(spec, plan, checkpoint, dtype, device)
        memory = memory_needed(spec, dtype, device, request.max_context, held)
        split = _split(named, spec, dtype, device, memory)
        if split is not None:
            device = split.devices[0]
        facts = _facts(checkpoint, family, spec, plan, device, dtype, memory)
        if split is not None:
            facts["devices"] = list(split.devices)
        found = Inspected(checkpoint, family, spec, plan, device, dtype, split, memory, facts)
        facts["notes"] = found.notes()
        return found
    except BaseException:
        checkpoint.close()
        raise


def choose_dtype(wanted: str, device: str, checkpoint: Checkpoint, plan: Plan) -> str:
    """`auto` is the dtype most of the weights are stored in. On a CPU, small models (under 1 GB)
    run in float32: it holds every stored value, and there bfloat16 saves no time worth having."""
    stored = _stored_dtype(checkpoint, plan)
    if wanted in ITEM_BYTES:
        return wanted
    if wanted != "auto":
        expected = "auto, float32, bfloat16 or float16"
        raise MoescopeError(f"dtype: expected {expected}, found {wanted[:20]!r}")
    total = sum(prod(placement.shape) for placement in plan.placements)
    small = total * ITEM_BYTES[stored] < SMALL
    return "float32" if small and devices.widens_small_models(device) else stored


def _stored_dtype(checkpoint: Checkpoint, plan: Plan) -> str:
    """The commonest dtype of the tensors that will be read; of packed ones that of their scales,
    unless those are in float32, which is no dtype of weights."""
    sizes = dict.fromkeys(_STORED, 0)
    for placement in plan.placements:
        for piece in placement.pieces:
            kinds = {checkpoint.tensors[name].dtype for name in piece.published} & sizes.keys()
            for kind in kinds - {"F32"} if piece.packed is not None else kinds:
                sizes[kind] += piece.elements
    return _STORED[max(sizes, key=lambda kind: sizes[kind])] if any(sizes.values()) else "bfloat16"


def weights_bytes(
    spec: DecoderSpec, plan: Plan, checkpoint: Checkpoint, dtype: str, device: str
) -> int:
    """What the weights take on a device: MLX keeps some of them packed."""
    if device != "mlx":
        return parameters.count(spec) * ITEM_BYTES[dtype]
    from moescope.engine import mlx_weights

    return mlx_weights.bytes_held(plan, checkpoint, dtype)


def memory_needed(
    spec: DecoderSpec, dtype: str, device: str, max_context: int, weights: int
) -> dict[str, int]:
    """Bytes for one lane of `max_context` tokens (at most the model's own context), beside those of
    the weights."""
    tokens = min(max_context, spec.context)
    cache = state_bytes(spec, tokens, ITEM_BYTES[dtype])
    return {
        "weights": weights,
        "cache": cache,
        "cache_tokens": tokens,
        "needed": int(weights * (1 + devices.RESERVE)) + cache,
        "free": devices.free_bytes(device),
    }


def check_memory(found: Inspected) -> None:
    """Raise RESOURCES where the model does not fit."""
    memory = found.memory
    if found.split is None and memory["needed"] > memory["free"]:
        raise devices.out_of_memory(memory)


def _split(
    names: tuple[str, ...], spec: DecoderSpec, dtype: str, device: str, memory: dict[str, int]
) -> devices.Split | None:
    """Over the devices asked for, or over all GPUs where one does not hold the model. RESOURCES
    where those do not hold it either."""
    if not names and device == "cuda" and memory["needed"] > memory["free"]:
        import torch

        names = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if len(names) < 2:
        return None
    free = {name: devices.free_bytes(name) for name in names}
    split = devices.split_layers(spec, ITEM_BYTES[dtype], memory["cache_tokens"], free)
    memory["free"] = sum(free.values())
    if split is None:
        listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in free.items())
        hint = f"free are {listed}; a shorter context, --dtype bfloat16, or more devices"
        raise devices.out_of_memory(memory, hint=hint)
    return split


def _reader(device: str) -> Callable[[Inspected, Progress], tuple[dict[str, Any], list[str]]]:
    """What fills the tensors of a plan with what is in the checkpoint, and says what is amiss."""
    if device == "mlx":
        from moescope.engine import mlx_weights

        return mlx_weights.read
    from moescope.engine import torch_weights

    return torch_weights.read


class Reporter:
    """Progress in bytes, at most twenty times a second. Several threads may count."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.what, self.last = "", 0.0
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self.last >= _REPORT_SECONDS or self.done >= self.total:
                self.last = now
                self.progress(Loading("reading", self.done, self.total, self.what))


def bytes_of(pieces: Iterable[Piece], checkpoint: Checkpoint) -> int:
    """What is read of a checkpoint for them."""
    return sum(checkpoint.tensors[name].nbytes for piece in pieces for name in piece.published)


def shortened(notes: list[str]) -> list[str]:
    """The first notes about tensors, and how many more there are."""
    if len(notes) <= NOTES:
        return notes
    more = f"and {len(notes) - NOTES} more tensors with values that are not finite"
    return [*notes[:NOTES], more]


def called(target: str) -> str:
    """A tensor of ours in words."""
    words = target.split(".")
    if words[0] != "layers":
        return target
    return f"layer {words[1]}: " + ("the router" if words[-2] == "gate" else ".".join(words[2:]))


def _interpreter(found: Inspected, weights: dict[str, Any]) -> Interpreter:
    if found.device == "mlx":
        from moescope.engine.mlx_decoder import MLXDecoder

        return MLXDecoder(found.spec, weights, dtype=found.dtype)
    from moescope.engine.torch_decoder import TorchDecoder

    layers = found.split.layers if found.split is not None else ()
    return TorchDecoder(found.spec, weights, device=found.device, dtype=found.dtype, devices=layers)


def _facts(
    checkpoint: Checkpoint,
    family: Family,
    spec: DecoderSpec,
    plan: Plan,
    device: str,
    dtype: str,
    memory: dict[str, int],
) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "family": family.title,
        "model_type": checkpoint.config["model_type"],
        "num_layers": len(spec.layers),
        "num_routers": len(spec.routers()),
        "device": device,
        "dtype": dtype,
        "weights_bytes": memory["weights"],
        "cache_bytes": memory["cache"],
        "parameters": parameters.count(spec),
        "active_parameters": parameters.count_active(spec),
        "context": spec.context,
        "vocab_size": spec.vocab_size,
        "layout": ", ".join(plan.layouts),
        "router_stored_as": router_words(plan, checkpoint.tensors),
        "unused_tensors": len(plan.unused),
    }
