"""State that is rewritten with every token: a short convolution's window, and a matrix.

What such an operator kept at an earlier position is gone unless somebody saved it; `save` and
`restore` hand the state of one lane out and take it back (`torch_rewind` decides when).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moescope.engine.torch_operators.common import convolution

Saved = tuple[Tensor, ...]


class Recurrent:
    """State of every lane: `window` [lanes, channels, kernel - 1] in the model's dtype, the last
    inputs of the convolution, and `matrix` [lanes, *shape] float32. Fresh lanes hold zeros."""

    def __init__(
        self, channels: int, kernel: int, matrix: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._shapes = ((channels, kernel - 1), dtype), (matrix, torch.float32)
        self.window = torch.empty(0, *self._shapes[0][0], dtype=dtype)
        self.matrix = torch.empty(0, *matrix)

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Room for `lanes` lanes, keeping what there is."""
        old = self.window, self.matrix
        self.window, self.matrix = (
            torch.zeros((lanes, *shape), dtype=dtype, device=device)
            for shape, dtype in self._shapes
        )
        for held, new in zip(old, (self.window, self.matrix), strict=True):
            new[: len(held)] = held

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the state that `source` has now."""
        self.window[target], self.matrix[target] = self.window[source], self.matrix[source]

    def save(self, lane: int) -> Saved:
        """A copy of what `lane` holds now."""
        return self.window[lane].clone(), self.matrix[lane].clone()

    def restore(self, lane: int, saved: Saved | None) -> None:
        """Make `lane` hold what was saved; None: that of a fresh lane."""
        if saved is None:
            self.window[lane].zero_()
            self.matrix[lane].zero_()
        else:
            self.window[lane], self.matrix[lane] = saved

    def convolve(
        self,
        lane: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x [T, channels] after what the lane saw before it -> [T, channels]; every channel is
        convolved with its own row of weight [channels, kernel]."""
        inputs = torch.cat((self.window[lane], x.T), -1)  # [channels, kernel - 1 + T]
        self.window[lane] = inputs[:, inputs.shape[1] - self.window.shape[-1] :]
        out = convolution(inputs[None], weight[:, None], bias, len(weight))[0]
        return (out if activation is None else activation(out)).T
