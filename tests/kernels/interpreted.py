"""Puts Triton's interpreter right, for kernels on CPU tensors: import this before any kernel.

Triton 3.6 interprets bfloat16 in two ways that no device knows: it cuts float32 off instead of
rounding it to nearest even, and it multiplies the bit patterns in `tl.dot`. Both are put right
here, so that a kernel is compared with its twin at the twin's rounding points. It also patches the
language anew for every call of one jitted function by another, which is half of its time: here it
does so once a launch. And it bounds a range by an array of one number, which numpy 2.4 takes for no
number. Nothing is changed where kernels are compiled, as tests that need a GPU do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _widened(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrowed(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)


def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    if (source, target) == (tl.bfloat16, tl.float32):
        return _widened(data)
    if (source, target) == (tl.float32, tl.bfloat16):
        return _narrowed(data)
    return _convert(data, source, target, mode)


def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    wide = [
        interpreter.TensorHandle(_widened(x.data), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _dot(self, *wide, d, *options)


_patch = interpreter._patch_lang
_everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def patch(_: Any) -> Any:
    scope = _patch(_everything)
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return scope


def call(self: Any, *arguments: Any, **named: Any) -> Any:
    return self.rewrite()(*arguments, **named)


if knobs.runtime.interpret:
    interpreter._patch_lang = patch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
