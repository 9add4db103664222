"""What the operators share: one call's lanes and positions, and state that is none.

Letters in this package: R rows (lanes × tokens), N lanes, T tokens of each, P policies a row is
routed under (the one in force, then the shadows), L routers, H hidden, I expert width, E experts,
K picked, D head width, S keys in sight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from moescope.engine.mlx_operators.matrix import Stored
from moescope.kernels.spec import Routing

Weights = Mapping[str, Stored]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True, slots=True)
class Static:
    """What a compiled step is made for; a call that differs in none of it runs the same step."""

    lanes: tuple[int, ...]
    tokens: int
    start: int  # of the one lane of a prompt; 0 where positions are read at run time
    seen: int  # rows of the caches that are looked at
    picks: tuple[int, ...]  # per router, the experts executed for a row: the most any lane asks for
    recorded: tuple[int, ...]  # per router, the picks recorded: shadows may ask for more
    gate_bits: tuple[int, ...]  # roundings of the gates' weights that are in force
    fields: frozenset[str]  # of the policies, those that any of them uses (`mlx_ops.fields_of`)
    scales_output: bool  # whether any of them multiplies the routed output
    shadows: int
    keep_logits: bool
    all_logits: bool
    slow_router: bool = False  # route in plain operators, and in the kernel beside them


@dataclass(slots=True)
class Call:
    """One run of the decoder. `state` and `read` are the present operator's: it replaces the arrays
    of its state, and finds what its branch read before the norm."""

    static: Static
    token_ids: mx.array  # [R]
    positions: mx.array  # [R]
    rows: mx.array  # [L, R, P, WIDTH], policies (`kernels.policy_rows`)
    rotations: dict[int, tuple[mx.array, mx.array]]  # by the id of a rope: cos, signed sin [R,1,D]
    routings: list[Routing] = field(default_factory=list)  # filled router by router, of R × P rows
    beside: list[Routing] = field(default_factory=list)  # the kernel's, where its twin routes
    masks: dict[tuple[int, int], mx.array] = field(default_factory=dict)
    corner: mx.array | None = None  # (lane, position) that the new rows of caches begin at
    state: list[mx.array] = field(default_factory=list)
    read: mx.array | None = None
    taps: dict[str, mx.array] = field(default_factory=dict)
    choice: mx.array | None = None  # what the last indexer let every row see [R, S]; None: all
    # sees each router, what it read [R, H] and its routing [R, P, ...], and gives the routing to
    # execute; never in a compiled step. `starts` of the lanes are known then.
    intervene: Callable[[Any, mx.array, Routing, Call], Routing] | None = None
    starts: tuple[int, ...] = ()

    def spans(self) -> Iterator[tuple[int, int, slice]]:
        """(lane, start, its rows) of every lane."""
        tokens = self.static.tokens
        for n, (lane, start) in enumerate(zip(self.static.lanes, self.starts, strict=True)):
            yield lane, start, slice(n * tokens, (n + 1) * tokens)

    @property
    def decodes(self) -> bool:
        """Whether every lane is fed one token, at a position read at run time."""
        return self.static.tokens == 1


@dataclass(frozen=True, slots=True)
class Held:
    """An array of an operator's state, [lanes, ...]: rows of its own for every token, or one that
    is rewritten with each."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    per_token: bool = True

    @property
    def nbytes(self) -> int:
        size = self.dtype.size
        for count in self.shape:
            size *= count
        return size


class Stateless:
    """An operator that keeps nothing of a lane."""

    def state(self, lanes: int, capacity: int) -> Sequence[Held]:
        """The arrays it needs for `lanes` lanes of `capacity` tokens."""
        return ()
