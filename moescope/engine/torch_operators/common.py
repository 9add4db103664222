"""What the operators share: one call's lanes and positions, the matrix product, state that is none.

Letters in this package: R rows (lanes × tokens), N lanes, T tokens of each, H hidden, I expert
width, E experts, K picked, G query heads per key head, D head width, S keys in sight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.spec import RouterSpec, Routing

Weights = Mapping[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TILE = 8
Groups = list[tuple[RouterSpec, Tensor | None]]  # which rows (None: all) a router spec is for


@dataclass(slots=True)
class Call:
    """One call of the decoder: N lanes of T tokens, `lanes[n]` from position `starts[n]` on."""

    lanes: tuple[int, ...]
    starts: tuple[int, ...]
    tokens: int
    token_ids: Tensor  # [R]
    positions: Tensor  # [R]
    groups: list[Groups]  # per router
    shadows: tuple[tuple[RouterSpec, ...], ...]  # per shadow variant, one spec per router
    keep_logits: bool
    routings: list[Routing]  # filled router by router, and per router the shadows'
    shadow_routings: list[list[Routing]]
    rotations: dict[int, tuple[Tensor, Tensor]]  # by the id of a rope: cos, signed sin [R, 1, D]
    read: Tensor = field(default_factory=lambda: torch.empty(0))  # the branch's, before its norm
    taps: dict[str, Tensor] = field(default_factory=dict)  # of the layer that runs
    # per lane what the last indexer let its tokens see [T, S]; None: all. One list for all devices.
    choices: list[Tensor | None] = field(default_factory=list)
    # sees each router, what its gate read [R, columns of the gate] and its routing, and gives the
    # routing to execute
    intervene: Callable[[Any, Tensor, Routing, Call], Routing] | None = None

    def spans(self) -> Iterator[tuple[int, int, slice]]:
        """(lane, start, its rows) of every lane."""
        for n, (lane, start) in enumerate(zip(self.lanes, self.starts, strict=True)):
            yield lane, start, slice(n * self.tokens, (n + 1) * self.tokens)


class Stateless:
    """An operator that keeps nothing of a lane."""

    def open(self, lanes: int, capacity: int, device: str) -> None:
        """Allocate state for `lanes` lanes of `capacity` tokens, keeping what there is."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the state that `source` has after its first `length` tokens."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, in] times weight [out, in].

    On a CPU, one float32 row is a matrix-vector product, and so is one bfloat16 row where there are
    tiles for it: there `mv` reads memory a fifth faster. Few float32 rows are padded to a whole
    tile, because the product rounds rows of a cut tile in other ways: lanes that do the same must
    get the same bits, wherever they stand in the batch.
    """
    rows = x.shape[0]
    if x.device.type == "cpu":
        if rows == 1 and bias is None and _prefers_mv(x.dtype):
            return torch.mv(weight, x[0]).unsqueeze(0)
        if 1 < rows < TILE and x.dtype is not torch.bfloat16:
            return F.linear(F.pad(x, (0, 0, 0, TILE - rows)), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """x [N, channels, T + taps - 1] under weight [out, channels / groups, taps] -> [N, out, T].

    float32 is float32 on CUDA too, where cuDNN would keep ten bits of what it multiplies.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return F.conv1d(x, weight, bias, groups=groups)


def split(x: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """The columns of x, one part after the other."""
    return torch.split(x, list(widths), -1)


def _prefers_mv(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and _has_tiles())


@cache
def _has_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 tiles (AMX)."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask()) if ask is not None else False
