"""What the operators keep for every lane, as MLX arrays [lanes, ...]: room, copies, and snapshots.

Arrays are handed over to a step and come back from it, so that they are written to where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moescope.engine.mlx_operators import Held, MLXOperator

States = list[list[mx.array]]  # per operator
Saved = list[mx.array]  # of one lane, the arrays that are rewritten with every token


class LaneStates:
    """`held` are the arrays by operator. Of attention, a lane goes back by forgetting rows; what is
    `rewritten` has to be saved and restored."""

    def __init__(self, operators: Sequence[MLXOperator]) -> None:
        self._operators = operators
        self.held: States = [[] for _ in operators]
        self.rewritten = [
            (number, place)
            for number, run in enumerate(operators)
            for place, kept in enumerate(run.state(1, 1))
            if not kept.per_token
        ]

    def bytes_of(self, lanes: int, capacity: int) -> int:
        """What `grow` allocates."""
        return sum(kept.nbytes for run in self._operators for kept in run.state(lanes, capacity))

    def grow(self, lanes: int, capacity: int) -> None:
        """Arrays for `lanes` lanes of `capacity` tokens, holding what there was."""
        wanted = [run.state(lanes, capacity) for run in self._operators]
        self.held = [
            [_grown(old[place : place + 1], kept) for place, kept in enumerate(kinds)]
            for old, kinds in zip(self.held, wanted, strict=True)
        ]
        mx.eval(self.held)

    def taken(self) -> States:
        """The arrays, which are the caller's until it gives new ones back."""
        states, self.held = self.held, []
        return states

    def copy(self, source: int, target: int) -> None:
        """Give `target` everything of `source`."""
        states = self.taken()
        for arrays in states:
            for place in range(len(arrays)):
                arrays[place] = _with_row(arrays[place], target, arrays[place][source])
            mx.eval(arrays)  # one operator's at a time: a copied array is held twice
        self.held = states

    def save(self, lane: int) -> Saved:
        """A copy of what is rewritten, of `lane`."""
        saved = [mx.contiguous(self.held[n][place][lane]) + 0 for n, place in self.rewritten]
        mx.eval(saved)
        return saved

    def restore(self, lane: int, saved: Saved | None) -> None:
        """Make `lane` hold what was saved; None: that of a fresh lane."""
        states = self.taken()
        for at, (number, place) in enumerate(self.rewritten):
            shape, dtype = states[number][place].shape[1:], states[number][place].dtype
            row = mx.zeros(shape, dtype) if saved is None else saved[at]
            states[number][place] = _with_row(states[number][place], lane, row)
        mx.eval(states)
        self.held = states


def _with_row(array: mx.array, lane: int, row: mx.array) -> mx.array:
    return mx.slice_update(array, row[None], mx.array([lane]), (0,))


def _grown(old: list[mx.array], kept: Held) -> mx.array:
    """Zeros of the wanted shape, holding what there was."""
    new = mx.zeros(kept.shape, kept.dtype)
    return mx.slice_update(new, old[0], mx.array([0]), (0,)) if old else new
