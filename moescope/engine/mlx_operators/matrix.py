"""Weight matrices as they are kept: dense, packed as mlx-lm publishes them, or one above another.

All take x [.., in] to [.., out], one expert's at a time where the first dimension counts experts.
A product is rounded once, to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class Matrix(Protocol):
    """[out, in], or [E, out, in]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __call__(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x [R, in] -> [R, out]."""

    def of_experts(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        """x [.., M, in], ids [..] in 0..E-1 -> [.., M, out]; `ordered` says that ids ascend."""

    def take(self, ids: mx.array) -> mx.array:
        """Rows [R, in] of a matrix, for ids [R] in 0..out-1."""

    def whole(self) -> mx.array:
        """The weights as one dense array."""


def accumulated(dtype: mx.Dtype) -> mx.Dtype:
    """What is given to products of experts and of packed weights where the model is in `dtype`.
    MLX's CPU multiplies chosen experts in float32 only, and sums up packed products in the dtype
    they are given in; so there it is given float32. The result is rounded all the same."""
    return dtype if mx.metal.is_available() else mx.float32


class Dense:
    """Weights as they are; experts in the dtype they are multiplied in."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        if weight.ndim == 3:
            self.weight = weight.astype(accumulated(weight.dtype))
        self._turned = self.weight.swapaxes(-1, -2)

    def __str__(self) -> str:
        return "dense"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def __call__(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        return x @ self._turned if bias is None else mx.addmm(bias, x, self._turned)

    def of_experts(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        wide = x.astype(self.weight.dtype)
        out = mx.gather_mm(wide, self._turned, rhs_indices=ids, sorted_indices=ordered)
        return out.astype(x.dtype)

    def take(self, ids: mx.array) -> mx.array:
        return self.weight[ids]

    def whole(self) -> mx.array:
        return self.weight


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights of few bits: `codes` uint32 packed along the inputs, with a scale (and, where affine,
    a bias) for every group of inputs. `mode` is MLX's word for it, `dtype` that of its numbers."""

    codes: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str
    dtype: mx.Dtype

    def __str__(self) -> str:
        return f"{self.mode} {self.bits} bit"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.scales.shape[-1] * self.group_size)

    def __call__(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        arrays = (self.codes, self.scales, self.biases)
        wide = x.astype(accumulated(x.dtype))
        out = mx.quantized_matmul(wide, *arrays, True, self.group_size, self.bits, self.mode)
        out = out.astype(x.dtype)
        return out if bias is None else out + bias

    def of_experts(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        return mx.gather_qmm(
            *(x.astype(accumulated(x.dtype)), self.codes, self.scales, self.biases),
            rhs_indices=ids,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        ).astype(x.dtype)

    def take(self, ids: mx.array) -> mx.array:
        biases = None if self.biases is None else self.biases[ids]
        return self._expanded(self.codes[ids], self.scales[ids], biases)

    def whole(self) -> mx.array:
        return self._expanded(self.codes, self.scales, self.biases)

    def _expanded(self, codes: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
        how = (self.group_size, self.bits, self.mode)
        return mx.dequantize(codes, scales, biases, *how, dtype=self.dtype)


class Above:
    """Matrices one above another that are not packed alike: q, k and v of different bits."""

    def __init__(self, parts: Sequence[Packed]) -> None:
        self.parts = tuple(parts)

    def __str__(self) -> str:
        return " and ".join(dict.fromkeys(map(str, self.parts)))

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[:-2], sum(part.shape[-2] for part in self.parts), first[-1])

    def __call__(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        out = mx.concatenate([part(x) for part in self.parts], -1)
        return out if bias is None else out + bias

    def of_experts(self, x: mx.array, ids: mx.array, *, ordered: bool = False) -> mx.array:
        outs = [part.of_experts(x, ids, ordered=ordered) for part in self.parts]
        return mx.concatenate(outs, -1)

    def take(self, ids: mx.array) -> mx.array:
        return self.whole()[ids]

    def whole(self) -> mx.array:
        return mx.concatenate([part.whole() for part in self.parts], -2)


Stored = mx.array | Packed | Above  # what a slot of `parameters.slots` holds


def matrix(stored: Stored) -> Matrix:
    """The matrix of a slot."""
    return Dense(stored) if isinstance(stored, mx.array) else stored


def array(stored: Stored | None) -> mx.array:
    """A slot that is no matrix of a product."""
    assert isinstance(stored, mx.array)
    return stored
