"""A device of compiled text in the place of MLX's own: `mx.fast.metal_kernel` without a Mac.

Arrays must have values when a kernel is called, so nothing around it may be compiled or traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from moescope.kernels.metal.launch import Kernel, Launch, gate_router_kernel, router_kernel
from tests.kernels.metal_shim.device import Library, as_bfloat16
from tests.kernels.metal_shim.routers import place_of

DTYPES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16", mx.int32: "int32"}


class Device:
    """`mx.fast.metal_kernel`, whose kernels run here. It refuses what MLX refuses."""

    def __init__(self, library: Library) -> None:
        self.library, self.launched = library, []

    def metal_kernel(self, *, name: str, **made: Any) -> Callable[..., list[mx.array]]:
        kernels = {k.name: k for k in (router_kernel(), gate_router_kernel())}
        kernel = kernels[name]
        assert made == {
            "input_names": list(kernel.input_names),
            "output_names": list(kernel.output_names),
            "header": kernel.header,
            "source": kernel.source,
        }
        return lambda **call: self.run(kernel, **call)

    def run(
        self,
        kernel: Kernel,
        *,
        inputs: Sequence[mx.array],
        template: list[tuple[str, int]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]:
        assert len(inputs) == len(kernel.input_names)
        assert len(output_shapes) == len(output_dtypes) == len(kernel.output_names)
        names = tuple(DTYPES[dtype] for dtype in output_dtypes)
        launch = Launch(kernel, tuple(template), grid, threadgroup, tuple(output_shapes), names, ())
        dtypes = [DTYPES[a.dtype] for a in inputs]
        place = place_of(self.library.variants, launch, *dtypes)
        arrays = [self.numpy(a) for a in inputs]
        self.launched.append(launch)
        return [mx.array(a) for a in self.library(place, launch, arrays)]

    @staticmethod
    def numpy(x: mx.array) -> np.ndarray:
        return (
            as_bfloat16(np.array(x.astype(mx.float32))) if x.dtype == mx.bfloat16 else np.array(x)
        )
