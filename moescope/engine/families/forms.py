"""In which order a published tensor holds what is a tensor of ours: a table of named forms.

A form is data: whether the last two dimensions are swapped, which stored row each of our rows is,
which dimensions of one are dropped. `apply` does it to one matrix (or vector) at a time, in torch
and numpy alike, so that a loader never holds a second copy of more than one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

PLAIN = "as stored"
Shape = tuple[int, ...]
Order = Callable[..., "np.ndarray[Any, Any]"]


@dataclass(frozen=True, slots=True)
class Form:
    """`order(rows, *sizes)` gives, for each of our rows, the stored row it is (after `transposed`);
    `sizes` takes them from the operator. `stored` is the published shape for one of ours. `folded`:
    experts are stacked along the rows, [E * rows, columns]. `minus` is subtracted."""

    stored: Callable[[Shape], Shape] = lambda shape: shape
    transposed: bool = False
    order: Order | None = None
    sizes: Callable[[Any], tuple[int, ...]] = lambda operator: ()
    folded: bool = False
    minus: float = 0.0


def _interleaved(rows: int) -> np.ndarray[Any, Any]:
    """Even rows first, then odd ones: [gate; up] of rows that alternate."""
    return np.arange(rows).reshape(-1, 2).T.ravel()


def _second_half_first(rows: int) -> np.ndarray[Any, Any]:
    return np.arange(rows).reshape(2, -1)[::-1].ravel()


def _by_group(rows: int, groups: int, *parts: int) -> np.ndarray[Any, Any]:
    """Stored group by group, each holding `parts` rows of every kind; ours kind by kind."""
    stored = np.arange(rows).reshape(groups, sum(parts))
    ends = np.cumsum(parts)[:-1]
    return np.concatenate([part.ravel() for part in np.split(stored, ends, axis=1)])


def _delta_parts(a: Any) -> tuple[int, ...]:
    """Rows of q, k, v, z in each key head of a gated DeltaNet."""
    values = a.value_heads // a.key_heads * a.value_dim
    return (a.key_heads, a.key_dim, a.key_dim, values, values)


def _delta_scalars(a: Any) -> tuple[int, ...]:
    """Rows of b and a in each key head."""
    values = a.value_heads // a.key_heads
    return (a.key_heads, values, values)


def _grouped_heads(a: Any) -> tuple[int, ...]:
    """Rows of q, k, v in each group of query heads that share keys and values."""
    values = a.v_head_dim or a.head_dim
    return (a.kv_heads, a.heads // a.kv_heads * a.head_dim, a.head_dim, values)


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], *shape[:-3:-1])


FORMS: dict[str, Form] = {
    PLAIN: Form(),
    "transposed": Form(_swapped, transposed=True),
    "interleaved": Form(order=_interleaved),
    "transposed interleaved": Form(_swapped, transposed=True, order=_interleaved),
    "up first": Form(order=_second_half_first),
    "experts in rows": Form(folded=True),
    "experts in rows, transposed": Form(_swapped, transposed=True, folded=True),
    "squeezed": Form(lambda shape: (shape[0], 1, *shape[1:])),  # [C, 1, K], a conv of torch
    "conv last": Form(lambda shape: (*shape, 1)),  # [C, K, 1], a conv of mlx
    "one row": Form(lambda shape: (1, *shape)),
    "inside ones": Form(lambda shape: (1, 1, *shape, 1)),
    "scalar": Form(lambda shape: ()),
    "plus one": Form(minus=1.0),  # 1 + w, where w is what the norm holds
    "qkv by group": Form(order=_by_group, sizes=_grouped_heads),
    "qkvz by key head": Form(order=_by_group, sizes=_delta_parts),
    "ba by key head": Form(order=_by_group, sizes=_delta_scalars),
}


class In:
    """A published place, and the forms its tensor may be in, told by shape; as stored, if none is
    given. `mlx` is the form where mlx-lm wrote the checkpoint."""

    __slots__ = ("forms", "mlx", "place")

    def __init__(self, place: str, *forms: str, mlx: str = "") -> None:
        unknown = [form for form in (*forms, mlx) if form and form not in FORMS]
        assert not unknown, unknown
        self.place, self.forms, self.mlx = place, forms or (PLAIN,), mlx


def stored_shape(form: str, shape: Shape, blocks: int = 0) -> Shape:
    """The published shape of what is `shape` here; its first dimension counts `blocks`, if any."""
    known = FORMS[form]
    if not blocks:
        return known.stored(shape)
    inner = known.stored(shape[1:])
    return (blocks * inner[0], *inner[1:]) if known.folded else (blocks, *inner)


def apply(form: str, stored: Any, shape: Shape, sizes: tuple[int, ...] = ()) -> Any:
    """One stored matrix or vector (torch or numpy) as `shape` of ours: a view where it can be.

    A form with `minus` computes in the dtype of `stored`.
    """
    known = FORMS[form]
    if known.transposed and len(stored.shape) > 1:
        stored = stored.swapaxes(-1, -2)
    rows = stored.reshape(shape)
    if known.order is not None:
        rows = rows[known.order(shape[0], *sizes)]
    return rows - known.minus if known.minus else rows
