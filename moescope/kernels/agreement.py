"""When two kernels agree: the rule every kernel is held to, as a function.

Two correct kernels may round a score differently, so ids must be equal only where the decision does
not hang on the last bits; elsewhere what was chosen must lie at the cut. Numpy only; torch tensors
on a CPU are taken too. Tests use it, and so does a running engine that checks itself.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.reference import F64, Selection, _descending, _rows, select
from moescope.kernels.spec import RouterSpec, Routing

ULPS = 8
WEIGHT_TOLERANCE = 1e-5

# significand bits (hidden one included) and the exponent of the smallest normal number
_FORMATS = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One row on which two routings differ by more than rounding explains."""

    row: int
    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: expected {self.expected}, found {self.found}"


def compare(
    expected: Routing,
    found: Routing,
    spec: RouterSpec,
    logits: Any,
    *,
    correction_bias: Any = None,
    limit: int = 16,
) -> list[Disagreement]:
    """Where `found` decides otherwise than `expected`, the reference; `limit` rows a field at most.

    Ids must be equal where adjacent selection values of ranks 1 to K+1, and the group cut, are more
    than 8 ulp of `score_dtype` apart, or are tied with equal logits; elsewhere every chosen value
    lies within 8 ulp of the cut. Weights of the same experts agree within 1e-5 (one ulp of
    `combine_dtype` where that is more).
    """
    raw = np.asarray(logits)
    bias = _rows(
        "correction_bias", correction_bias, raw.shape, spec.policy.correction_bias != "none"
    )
    with np.errstate(all="ignore"):
        rows = _Rows.of(expected, found, spec, select(raw, spec, bias), bias)
        checks = (*_check_ids(rows), *_check_weights(rows), *_check_sums(rows))
    out = []
    for name, wrong, want, have in checks:
        for row in np.flatnonzero(wrong)[:limit]:
            out.append(Disagreement(int(row), name, str(want[row]), str(have[row])))
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Both routings and what the comparison needs to know about each row."""

    a: dict[str, NDArray[Any]]
    b: dict[str, NDArray[Any]]
    spec: RouterSpec
    values: F64  # [T, E] selection values, admissible or -inf
    slack: F64  # [T, 1] 8 ulp at the cut
    strict: NDArray[np.bool_]  # [T] ids must be equal
    open_cut: NDArray[np.bool_]  # [T] even the group cut hangs on rounding
    same: NDArray[np.bool_]  # [T] both are valid and chose the same set

    @classmethod
    def of(
        cls, a: Routing, b: Routing, spec: RouterSpec, chosen: Selection, bias: F64 | None
    ) -> _Rows:
        K, names = spec.K, (n for n in Routing.__slots__ if n != "logits")
        left, right = {}, {}
        for name in names:
            left[name], right[name] = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        valid = left["expert_ids"][:, 0] >= 0
        T = len(valid)
        order = _descending(chosen.values, spec.policy.tie_break == "higher_id")[:, : K + 1]
        ranked = np.take_along_axis(chosen.values, order, axis=1)
        dtype = spec.policy.score_dtype
        clear = _clear(ranked, dtype) | _tied(order, chosen.logits, bias)
        open_cut = np.zeros(T, bool)
        if chosen.group_scores is not None:
            groups = -np.sort(-chosen.group_scores, axis=1)
            cut = groups[:, spec.policy.topk_group - 1 : spec.policy.topk_group + 1]
            open_cut = ~_clear(cut, dtype)[:, 0]
        strict = clear.all(1) & ~open_cut
        if spec.wiring.hash_table:
            strict, open_cut = np.ones(T, bool), np.zeros(T, bool)
        same = valid & (np.sort(left["expert_ids"]) == np.sort(right["expert_ids"])).all(1)
        slack = ULPS * ulp(ranked[:, K - 1 : K], dtype)
        return cls(left, right, spec, chosen.values, slack, strict, open_cut, same)


Check = tuple[str, NDArray[np.bool_], NDArray[Any], NDArray[Any]]


def _check_ids(rows: _Rows) -> list[Check]:
    a, b = rows.a["expert_ids"], rows.b["expert_ids"]
    valid = a[:, 0] >= 0
    checks: list[Check] = [
        ("validity", (valid & (b < 0).any(1)) | (~valid & (b >= 0).any(1)), a, b),
        ("expert_ids", valid & rows.strict & (a != b).any(1), a, b),
    ]
    loose = valid & ~rows.strict & (b >= 0).all(1)
    ordered = np.sort(b, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1) | (b >= rows.spec.E).any(1)
    checks.append(("distinct expert_ids", loose & twice, a, b))
    chosen = np.take_along_axis(rows.values, np.clip(b, 0, rows.spec.E - 1), axis=1)
    cut = np.take_along_axis(rows.values, np.maximum(a[:, -1:], 0), axis=1)
    below = (chosen < cut - rows.slack).any(1)
    checks.append(("expert_ids at the cut", loose & ~twice & ~rows.open_cut & below, a, b))
    return checks


def _check_weights(rows: _Rows) -> list[Check]:
    """Weights and scores of the same experts, whatever order they stand in."""
    checks: list[Check] = []
    for name, dtype in (
        ("weights", rows.spec.wiring.combine_dtype),
        ("scores", rows.spec.policy.score_dtype),
    ):
        a, b = rows.a[name], rows.b[name]
        x = np.take_along_axis(a, np.argsort(rows.a["expert_ids"], axis=1, kind="stable"), axis=1)
        y = np.take_along_axis(b, np.argsort(rows.b["expert_ids"], axis=1, kind="stable"), axis=1)
        # of weights above 1, which only large scaling factors give, the same share
        most = WEIGHT_TOLERANCE * np.maximum(1.0, np.abs(x))
        far = _far(x, y, most + (dtype != "float32") * ulp(x, dtype))
        checks.append((name, rows.same & far.any(1), a, b))
        invalid = rows.a["expert_ids"][:, 0] < 0
        checks.append((f"{name} of an invalid row", invalid & _far(a, b, 0.0).any(1), a, b))
    return checks


def _check_sums(rows: _Rows) -> list[Check]:
    checks: list[Check] = []
    K, invalid = rows.spec.K, rows.a["expert_ids"][:, 0] < 0
    coarse = rows.spec.wiring.combine_dtype, rows.spec.policy.score_dtype
    for name in ("score_sum", "mass", "entropy", "margin"):
        a, b = rows.a[name], rows.b[name]
        parts = rows.a["scores" if name == "mass" else "weights"]
        size = np.abs(parts.astype(np.float64)).sum(1)
        size = np.where(np.isfinite(size), size, 0.0)  # then sums are not finite either
        slack = K * WEIGHT_TOLERANCE + 1e-5 * size
        for dtype in coarse:
            slack = slack + (dtype != "float32") * K * ulp(size, dtype)
        if name == "margin":
            slack = 1e-5 + 2 * rows.slack[:, 0]
        where = {"margin": rows.same & rows.strict, "entropy": ~invalid}.get(name, rows.same)
        checks.append((name, (where | invalid) & _far(a, b, slack), a, b))
    a, b = rows.a["runner_up"], rows.b["runner_up"]
    values = np.take_along_axis(rows.values, np.stack([a, b], 1).clip(0), axis=1)
    off = (np.abs(values[:, 0] - values[:, 1]) > rows.slack[:, 0]) & (a != b)
    off |= (a < 0) != (b < 0)
    checks.append(("runner_up", ((rows.same & rows.strict) | invalid) & off, a, b))
    return checks


def ulp(x: F64, dtype: str) -> F64:
    """The distance between neighbours of `x` in `dtype`."""
    bits, least = _FORMATS[dtype]
    exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, least) - (bits - 1))


def _clear(ranked: F64, dtype: str) -> NDArray[np.bool_]:
    """Which neighbours [T, n - 1] differ by more than 8 ulp; what is not admissible is far off."""
    above, below = ranked[:, :-1], ranked[:, 1:]
    return above - below > ULPS * ulp(above, dtype)


def _tied(order: NDArray[np.intp], logits: F64, bias: F64 | None) -> NDArray[np.bool_]:
    """Which neighbours are tied because they are the same number, bias included."""
    same = _same_neighbours(np.take_along_axis(logits, order, axis=1))
    if bias is not None:
        rows = np.broadcast_to(bias, logits.shape)
        same &= _same_neighbours(np.take_along_axis(rows, order, axis=1))
    return same


def _same_neighbours(x: F64) -> NDArray[np.bool_]:
    return x[:, :-1] == x[:, 1:]


def _far(a: NDArray[Any], b: NDArray[Any], slack: Any) -> NDArray[np.bool_]:
    """Further apart than `slack`; NaN agrees with NaN only, infinities with themselves."""
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    return ~(equal | (np.abs(a.astype(np.float64) - b) <= slack))
