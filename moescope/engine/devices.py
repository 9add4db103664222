"""Where a model runs: the device, what memory it has left, and layers split over several.

A split keeps layers whole and in order. The first device also holds the embedding, the final norm
and the head; a token's hidden state is handed from device to device.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from moescope.engine import parameters
from moescope.engine.decoder import DecoderSpec, Layer, state_bytes
from moescope.errors import ExitCode, MoescopeError

RESERVE = 0.02  # of the weights: buffers, logits, the allocator's rounding
MAX_DEVICES = 16
HUGE = 4 << 20  # bytes from which huge pages are worth asking for
_NAME = re.compile(r"(cpu|cuda):(\d{1,3})")


def choose_device(wanted: str) -> str:
    """`auto` is MLX on Apple silicon, CUDA where torch has it, else the CPU."""
    if wanted not in ("auto", "cpu", "cuda", "mlx"):
        raise MoescopeError(f"device: expected auto, cpu, cuda or mlx, found {wanted[:20]!r}")
    if wanted == "mlx" and find_spec("mlx") is None:
        raise MoescopeError("device mlx: mlx is not installed", hint="pip install 'moescope[mlx]'")
    if wanted == "mlx" or (wanted == "auto" and _is_apple_silicon() and has_metal()):
        return "mlx"
    usable = _torch(wanted).cuda.is_available()
    if wanted == "cuda" and not usable:
        raise MoescopeError(
            "device cuda: torch finds no CUDA device here",
            hint="--device cpu, or a torch built for CUDA",
        )
    return "cuda" if usable and wanted != "cpu" else "cpu"


def has_metal() -> bool:
    """Whether MLX is installed and finds a GPU of Apple's."""
    try:
        import mlx.core as mx
    except ImportError:
        return False
    return bool(mx.metal.is_available())


def widens_small_models(device: str) -> bool:
    """Whether models that are small run in float32 there: on CPUs."""
    return device.startswith("cpu") or (device == "mlx" and not has_metal())


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _torch(device: str) -> Any:
    """torch, which `pip install moescope` brings everywhere but on Apple silicon."""
    try:
        import torch
    except ImportError as error:
        hint = "pip install torch" + (", or --device mlx" if has_metal() else "")
        raise MoescopeError(f"device {device}: torch is not installed", hint=hint) from error
    return torch


def check_devices(names: Sequence[str]) -> tuple[str, ...]:
    """Names such as cuda:0 and cuda:1, of one kind, each there and named once."""
    if not 1 <= len(names) <= MAX_DEVICES:
        raise MoescopeError(f"devices: expected 1 to {MAX_DEVICES}, found {len(names)}")
    kinds = set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise MoescopeError(f"devices: expected names such as cuda:0, found {name[:20]!r}")
        kinds.add(match[1])
        if match[1] == "cuda" and int(match[2]) >= (found := _torch(name).cuda.device_count()):
            raise MoescopeError(f"devices: {name}: torch finds {found} here")
    if len(kinds) > 1 or len(set(names)) < len(names):
        raise MoescopeError(f"devices: expected different ones of one kind, found {list(names)}")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes needed on each device, and the device of each layer."""

    devices: tuple[str, ...]
    layers: tuple[str, ...]
    needed: dict[str, int]


def split_layers(
    spec: DecoderSpec, element_size: int, tokens: int, free: dict[str, int]
) -> Split | None:
    """Layers in order over the devices of `free` (device -> bytes), each by its share of the free
    memory, with a cache of `tokens` tokens; None where they do not fit so."""
    weights = _layer_weights(spec)
    state = [_layer_state(layer, spec, tokens, element_size) for layer in spec.layers]
    sizes = [
        int(element_size * count * (1 + RESERVE)) + kept
        for count, kept in zip(weights, state, strict=True)
    ]
    ends = int(element_size * (parameters.count(spec) - sum(weights)) * (1 + RESERVE))
    devices = tuple(free)
    needed = dict.fromkeys(devices, 0)
    needed[devices[0]] = ends
    # A device takes layers until it holds its share of everything; the last takes the rest.
    whole, available = ends + sum(sizes), sum(free.values())
    layers, at, held, due = [], 0, ends, whole * free[devices[0]] / available
    for size in sizes:
        while at + 1 < len(devices) and held + size / 2 > due:
            at += 1
            due += whole * free[devices[at]] / available
        layers.append(devices[at])
        needed[devices[at]] += size
        held += size
    fits = all(needed[device] <= free[device] for device in devices)
    return Split(devices, tuple(layers), needed) if fits else None


def _layer_weights(spec: DecoderSpec) -> list[int]:
    """Parameters of each layer."""
    counts = [0] * len(spec.layers)
    for slot in parameters.slots(spec):
        if slot.name.startswith("layers."):
            counts[int(slot.name.split(".")[1])] += slot.elements
    return counts


def _layer_state(layer: Layer, spec: DecoderSpec, tokens: int, element_size: int) -> int:
    return state_bytes(replace(spec, layers=(layer,)), tokens, element_size)


def free_bytes(device: str) -> int:
    """Memory that can still be taken: of the GPU, or of this machine and its control group."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    known = (_available(), _left_in_group(), _left_for_metal() if device == "mlx" else None)
    found = [size for size in known if size is not None]
    if found:
        return min(found)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ask_for_huge_pages(address: int, size: int) -> None:
    """Of memory nobody has touched yet: fewer look-ups while weights stream by, a tenth more
    tokens per second. A system that has none, or will not, changes nothing."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if advice is not None and whole >= HUGE:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), advice)


def out_of_memory(memory: dict[str, int], *, hint: str = "") -> MoescopeError:
    """`memory` as `load.memory_needed` gives it."""
    gb = {name: f"{size / 1e9:.1f}" for name, size in memory.items()}
    return MoescopeError(
        f"needs {gb['needed']} GB (weights {gb['weights']} + cache {gb['cache']}); "
        f"free {gb['free']} GB",
        hint=hint or "a smaller model, a shorter context, --dtype bfloat16, or end other programs",
        code=ExitCode.RESOURCES,
    )


def _available() -> int | None:
    """What Linux says can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _left_for_metal() -> int | None:
    """What Metal recommends to use, less what MLX uses already."""
    if not has_metal():
        return None
    import mlx.core as mx

    most = mx.device_info().get("max_recommended_working_set_size")
    return None if most is None else max(0, int(most) - int(mx.get_active_memory()))


def _left_in_group() -> int | None:
    """What a container's limit leaves (control groups, version 2)."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            most = int(limit.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            return max(0, most - int(used.read()))
    except (OSError, ValueError):
        return None
