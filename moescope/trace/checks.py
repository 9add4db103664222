"""Whether the columns of a chunk can be what a recorder wrote: shapes, ranges, finite numbers.

A checksum tells accidents; these tell lies. Every function returns the first fault as words, or
None. The rules for NaN are those of `Routing`: in invalid rows, where there is no runner-up, in
unused logits; and a weight that is not finite shows in its row's score sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.fields import ARRAYS, FLAGS, SCALARS

Array = NDArray[Any]
Get = Callable[[str], Array]  # another column of the same chunk

FIXED: dict[str, tuple[str, str]] = {
    "flags": ("<u2", ""),
    "shape": ("<u2", "3"),
    "variant": ("<u2", ""),
    "alternatives": ("<u2", ""),
    "alternatives.ids": ("<i4", "A"),
    "alternatives.logprobs": ("<f4", "A"),
    **{name: (dtype, "") for name, dtype in SCALARS},
    **{name: (dtype, letters) for name, dtype, letters, _ in ARRAYS},
}
SHADOWS = {
    "": ("<i2", "2"),
    "expert_ids": ("<i2", "LK"),
    "weights": ("<f4", "LK"),
    "score_sum": ("<f4", "L"),
}
FLOATS_BY_ROW = ("score_sum", "mass", "entropy")


def structure_fault(name: str, column: Array, count: int, shape: Array) -> str | None:
    """Whether a column has the type and the shape that the chunk's `shape` column promises."""
    if name in ("strings", "counts_lanes", "counts"):
        return None  # checked by those who parse them
    shadow = name.startswith("shadow")
    dtype, letters = SHADOWS[name.partition(".")[2]] if shadow else FIXED[name]
    if column.dtype != np.dtype(dtype):
        return f"{name}: expected {np.dtype(dtype)}, found {column.dtype}"
    sizes: dict[str, int | None] = dict(zip("LKE", shape.max(axis=0).tolist(), strict=True))
    sizes |= {"2": 2, "3": 3, "A": None}
    if shadow:
        sizes["K"] = None
    expected = (count, *(sizes[letter] for letter in letters))
    fits = len(expected) == column.ndim and all(
        want is None or want == found for want, found in zip(expected, column.shape, strict=True)
    )
    return None if fits else f"{name}: expected shape {expected}, found {column.shape}"


def value_fault(
    name: str, column: Array, get: Get, classes: Mapping[int, Array], absent: tuple[str, ...]
) -> str | None:
    """Whether the values of one column can be true. `classes` as in `classes_by_router_count`."""
    if name == "shape":
        return _router_fault(column, classes)
    if name in ("sequence", "lane", "position") and column.min() < 0:
        return f"{name}: expected at least 0, found {column.min()}"
    if name in ("token_id", "rank") and column.min() < -1:
        return f"{name}: expected at least -1, found {column.min()}"
    if name == "phase" and column.max() > 1:
        return f"phase: expected 0 or 1, found {column.max()}"
    if name in ("expert_ids", "runner_up") or name.endswith(".expert_ids"):
        return _id_fault(name, column, get("shape"), classes)
    if name in absent or np.isfinite(column).all():
        return None
    if name in FLOATS_BY_ROW:
        return _row_fault(name, column, get)
    if name == "margin":
        bad = np.isnan(column) & _valid(get) & (get("runner_up") >= 0)
        return _not_finite(name, bad)
    if name == "logits":
        return _logits_fault(column, get, classes)
    if name in ("weights", "scores"):
        bad = ~np.isfinite(column) & (get("expert_ids") >= 0)
        if name == "weights":
            bad &= np.isfinite(get("score_sum"))[..., None]
        return _not_finite(name, bad)
    return None


def _valid(get: Get) -> Array:
    """[n, L]: the rows in which a router chose something."""
    return np.asarray((get("expert_ids") >= 0).any(axis=2))


def _not_finite(name: str, bad: Array) -> str | None:
    return f"{name}: expected finite numbers, found {int(bad.sum())} others" if bad.any() else None


def _router_fault(shape: Array, classes: Mapping[int, Array]) -> str | None:
    if not classes:
        return None
    for routers in np.unique(shape[:, 0]).tolist():
        if routers not in classes:
            wanted = " or ".join(map(str, classes))
            return f"routers: expected {wanted}, found {routers}"
    return None


def _id_fault(name: str, ids: Array, shape: Array, classes: Mapping[int, Array]) -> str | None:
    if ids.min(initial=0) < -1:
        return f"{name}: expected at least -1, found {ids.min()}"
    for routers in np.unique(shape[:, 0]).tolist():
        if routers not in classes:
            continue
        mine = ids[shape[:, 0] == routers][:, :routers]
        limit = classes[routers].reshape(1, routers, *(1,) * (ids.ndim - 2))
        if (mine >= limit).any():
            router = int(np.argwhere(mine >= limit)[0][1])
            return f"{name}: expected below {classes[routers][router]} in router {router}"
    return None


def _row_fault(name: str, column: Array, get: Get) -> str | None:
    bad = ~np.isfinite(column) & _valid(get)
    if name == "score_sum" and bad.any() and (get("flags") & FLAGS["weights"]).any():
        odd = ~np.isfinite(get("weights")) & (get("expert_ids") >= 0)
        bad &= ~odd.any(axis=2)
    elif name == "score_sum":
        return None  # a sum of weights that are not recorded may be anything
    return _not_finite(name, bad)


def _logits_fault(logits: Array, get: Get, classes: Mapping[int, Array]) -> str | None:
    bad = (np.isnan(logits) | np.isposinf(logits)) & _valid(get)[..., None]
    bad &= ((get("flags") & FLAGS["logits"]) > 0)[:, None, None]
    shape, classes_of = get("shape"), np.arange(logits.shape[2])
    for routers in np.unique(shape[:, 0]).tolist():
        mine = shape[:, 0] == routers
        bad[mine] &= classes_of < shape[mine, 2][:, None, None]
        if routers in classes:
            limit = np.zeros((logits.shape[1], 1), dtype=np.int64)
            limit[:routers, 0] = classes[routers]
            bad[mine] &= classes_of < limit
    return _not_finite("logits", bad)
