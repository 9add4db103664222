"""State that is rewritten with every token: a short convolution's window, and a matrix.

What such an operator kept at an earlier position is gone; `mlx_decoder` takes snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from moescope.engine.mlx_operators.common import DTYPES, Call, Held


class Recurrent:
    """State of every lane: `window` [lanes, channels, kernel - 1] in the model's dtype, the last
    inputs of the convolution, and `matrix` [lanes, *shape] float32. Fresh lanes hold zeros."""

    def __init__(self, channels: int, kernel: int, matrix: tuple[int, ...], dtype: str) -> None:
        self._kept = (((channels, kernel - 1), DTYPES[dtype]), (matrix, mx.float32))

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        """The arrays it needs for `lanes` lanes, whatever their length."""
        kept = self._kept if self._kept[1][0] else self._kept[:1]
        return tuple(Held((lanes, *shape), dtype, per_token=False) for shape, dtype in kept)

    def convolve(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array | None,
        call: Call,
        activation: Callable[[mx.array], mx.array] | None = None,
    ) -> mx.array:
        """x [R, channels] after what each lane saw before it -> [R, channels]; every channel is
        convolved with its own row of weight [channels, kernel]."""
        lanes, T = call.static.lanes, call.static.tokens
        kernel = weight.shape[1]
        fed = x.reshape(len(lanes), T, -1).swapaxes(1, 2)  # [N, channels, T]
        inputs = mx.concatenate([of_lanes(call.state[0], lanes), fed], -1)
        call.state[0] = with_lanes(call.state[0], lanes, inputs[..., T:])
        wide, taps = inputs.astype(mx.float32), weight.astype(mx.float32)
        out = wide[..., :T] * taps[:, :1]
        for at in range(1, kernel):
            out = out + wide[..., at : at + T] * taps[:, at : at + 1]
        if bias is not None:
            out = out + bias.astype(mx.float32)[:, None]
        out = out.astype(x.dtype)
        out = out if activation is None else activation(out)
        return out.swapaxes(1, 2).reshape(x.shape)


def of_lanes(array: mx.array, lanes: tuple[int, ...]) -> mx.array:
    """The rows of these lanes [N, ...]; a view, unless lanes are missing in between."""
    first, last = lanes[0], lanes[-1]
    if lanes == tuple(range(first, last + 1)):
        return array[first : last + 1]
    return array[mx.array(lanes)]


def with_lanes(array: mx.array, lanes: tuple[int, ...], rows: mx.array) -> mx.array:
    """`array` with the rows of these lanes replaced."""
    rows = rows.astype(array.dtype)
    if lanes == tuple(range(len(array))):
        return rows
    written = array[...]  # what follows assigns to the name, not to the caller's array
    written[mx.array(lanes)] = rows
    return written
