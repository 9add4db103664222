"""Runs launches of the Metal kernels here: in this process with fibers, or as a program under a
sanitiser with threads. Arrays are numpy; bfloat16 travels as float32 until it is handed over."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moescope.kernels.metal.launch import Launch
from moescope.kernels.spec import Routing
from tests.kernels.metal_shim.build import Variant


@dataclass(frozen=True, slots=True)
class How:
    """In which order lanes and rows run, and whether denormals are 0, as on GPUs of Apple."""

    backwards: bool = False
    flush: bool = False


USUAL = How()


class Library:
    """Lanes as fibers, in this process. A call runs one of the variants it was compiled for."""

    def __init__(self, path: Path, variants: Sequence[Variant]) -> None:
        self._library = ctypes.CDLL(str(path))
        self.variants = tuple(variants)

    def __call__(
        self, variant: int, launch: Launch, inputs: Sequence[np.ndarray], how: How = USUAL
    ) -> list[np.ndarray]:
        """Outputs of `launch`; RuntimeError where the lanes do not stay together."""
        outputs = empty(launch)
        arrays = [*map(np.ascontiguousarray, inputs)]
        error = ctypes.create_string_buffer(200)
        failed = self._library.run(
            variant,
            _pointers(arrays),
            _pointers(outputs),
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(*launch.threadgroup),
            int(how.backwards),
            int(how.flush),
            error,
            ctypes.c_size_t(len(error)),
        )
        if failed:
            raise RuntimeError(error.value.decode())
        return outputs


def run_program(
    path: Path, variant: int, launch: Launch, inputs: Sequence[np.ndarray], how: How = USUAL
) -> list[np.ndarray]:
    """As a call of `Library`, in a program of its own; RuntimeError with what a sanitiser found."""
    outputs = empty(launch)
    arrays = [*map(np.ascontiguousarray, inputs)]
    head = [variant, how.backwards, how.flush, *launch.grid, *launch.threadgroup]
    head += [len(arrays), len(outputs), *(a.nbytes for a in (*arrays, *outputs))]
    sent = np.array(head, np.uint32).tobytes() + b"".join(a.tobytes() for a in arrays)
    stop = "halt_on_error=1 exitcode=66"
    options = {"TSAN_OPTIONS": stop, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": stop}
    done = subprocess.run(
        [str(path)], input=sent, capture_output=True, timeout=100, env={**os.environ, **options}
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    at = 0
    for array in outputs:
        flat = np.frombuffer(done.stdout, array.dtype, array.size, at)
        array[...] = flat.reshape(array.shape)
        at += array.nbytes
    return outputs


def empty(launch: Launch) -> list[np.ndarray]:
    """Room for the outputs, filled with what nobody would write."""
    pairs = zip(launch.output_shapes, launch.output_dtypes, strict=True)
    return [np.full(shape, 77, dtype) for shape, dtype in pairs]


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 values that bfloat16 holds, as the bits of bfloat16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def routing(outputs: Sequence[Any]) -> Routing:
    """Outputs stand in the order of the fields of `Routing`."""
    return Routing(*outputs[:8], logits=outputs[8] if len(outputs) > 8 else None)


def _pointers(arrays: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
