"""The router in C (`native/router.c`) on numpy arrays: one row of logits at a time, on the CPU.

Same contract as `reference.py`, whose semantics the C code has row for row. A fused decode step
calls the C function itself; this is the way in for `kernels.route`, tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.policy_rows import WIDTH, pack
from moescope.kernels.reference import _hashed_ids, _rows, check_spec
from moescope.kernels.spec import RouterSpec, Routing

_SCALARS = 4  # score sum, mass, entropy, margin: `enum mk_scalar`
_POINTER, _INT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
_ROUTE_ROWS = (
    _INT,  # instruction set
    *(_POINTER, _STRIDE, _INT, _INT),  # logits, stride, T, E
    *(_POINTER, _INT, _POINTER, _INT),  # policies, R, row_of, P
    *(_POINTER, _STRIDE) * 3,  # bias, scale, hash ids, each with its stride
    _INT,  # K_max
    *(_POINTER,) * 6,  # ids, scores, weights, scalars, runner up, scratch
)


def route_native(
    logits: Any,
    spec: RouterSpec,
    *,
    correction_bias: Any = None,
    per_expert_scale: Any = None,
    token_ids: Any = None,
    hash_table: Any = None,
    keep_logits: bool = False,
    isa: int = -1,
) -> Routing:
    """See `moescope.kernels.route`; `isa` as in `route_rows`. RuntimeError where the library was
    not built."""
    check_spec(spec)
    raw = np.asarray(logits)
    if raw.ndim != 2 or raw.shape[1] != spec.E:
        raise ValueError(f"logits: expected [T, {spec.E}], found {list(raw.shape)}")
    p, T = spec.policy, len(raw)
    bias = _rows("correction_bias", correction_bias, raw.shape, p.correction_bias != "none")
    scale = _rows("per_expert_scale", per_expert_scale, raw.shape, p.per_expert_scale)
    hashed = None
    if spec.wiring.hash_table:
        hashed = _hashed_ids(token_ids, hash_table, T, spec).astype(np.int32)
    with np.errstate(over="ignore"):
        raw = np.ascontiguousarray(raw, dtype=np.float32)
        ids, scores, weights, scalars, runner_up = route_rows(
            raw, _packed(spec), np.zeros((T, 1), np.int32), spec.K, bias, scale, hashed, isa
        )
    score_sum, mass, entropy, margin = np.ascontiguousarray(scalars[:, 0].T)
    return Routing(
        expert_ids=ids[:, 0],
        scores=scores[:, 0],
        weights=weights[:, 0],
        score_sum=score_sum,
        mass=mass,
        entropy=entropy,
        margin=margin,
        runner_up=runner_up[:, 0],
        logits=raw.copy() if keep_logits else None,
    )


def route_rows(
    logits: NDArray[np.float32],
    policies: NDArray[np.float64],
    row_of: NDArray[np.int32],
    K_max: int,
    correction_bias: NDArray[Any] | None = None,
    per_expert_scale: NDArray[Any] | None = None,
    hash_ids: NDArray[np.int32] | None = None,
    isa: int = -1,
) -> tuple[NDArray[Any], ...]:
    """Route logits [T, E] under rows of policies [R, WIDTH]: `row_of` [T, P] says which, -1: none.

    Learned vectors are [1, E] or [T, E], hash ids [T, K_max]. `isa` is -1 for the widest
    instruction set this machine has, else a place among the `instruction_sets()`. Returns ids int32
    and scores and weights float32 [T, P, K_max], score sum, mass, entropy and margin float32
    [T, P, 4], and runners-up int32 [T, P]. Rows whose policy does not fit come back invalid;
    ValueError for arrays of other shapes.
    """
    (T, E), P = logits.shape, row_of.shape[-1]
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    policies = _fitting("policies", policies, np.float64, (len(policies),), WIDTH)
    row_of = _fitting("row_of", row_of, np.int32, (T,), P)
    vectors = [
        _vector("correction_bias", correction_bias, np.float32, T, E),
        _vector("per_expert_scale", per_expert_scale, np.float32, T, E),
        _vector("hash_ids", hash_ids, np.int32, T, K_max),
    ]
    library = _library()
    scratch = np.empty(library.mk_route_scratch(E), np.uint8)
    results, (ids, runner_up, scores, weights, scalars) = _results(T * P, K_max)
    first = results.ctypes.data
    library.mk_route_rows(
        isa,
        *(logits.ctypes.data, E, T, E),
        *(policies.ctypes.data, len(policies), row_of.ctypes.data, P),
        *(part for vector in vectors for part in vector[:2]),
        K_max,
        *(first + 4 * place for place in (ids.start, scores.start, weights.start)),
        *(first + 4 * scalars.start, first + 4 * runner_up.start, scratch.ctypes.data),
    )
    floats = results.view(np.float32)
    return (
        results[ids].reshape(T, P, K_max),
        floats[scores].reshape(T, P, K_max),
        floats[weights].reshape(T, P, K_max),
        floats[scalars].reshape(T, P, _SCALARS),
        results[runner_up].reshape(T, P),
    )


def _results(rows: int, K_max: int) -> tuple[NDArray[np.int32], tuple[slice, ...]]:
    """Room for all results, and where ids, runners-up, scores, weights and scalars stand in it: one
    array, because to ask numpy for an address takes as long as to route a row."""
    ends = list(accumulate((0, rows * K_max, rows, rows * K_max, rows * K_max, rows * _SCALARS)))
    return np.empty(ends[-1], np.int32), tuple(map(slice, ends, ends[1:]))


def instruction_sets() -> tuple[str, ...]:
    """What the router can run on here, the narrowest first."""
    return ("portable", "avx2", "avx512")[: _library().mk_route_isas()]


def _vector(
    name: str, value: NDArray[Any] | None, dtype: Any, T: int, width: int
) -> tuple[int | None, int, NDArray[Any] | None]:
    """Address, stride from one row of logits to the next, and the array, to be kept alive."""
    if value is None:
        return None, 0, None
    array = _fitting(name, value, dtype, (1, T), width)
    return array.ctypes.data, array.shape[1] if len(array) > 1 else 0, array


def _fitting(
    name: str, value: NDArray[Any], dtype: Any, rows: tuple[int, ...], width: int
) -> NDArray[Any]:
    """`value` as C reads it. ValueError where C would read beyond its end."""
    array = np.ascontiguousarray(value, dtype=dtype)
    if array.ndim != 2 or len(array) not in rows or array.shape[1] != width:
        raise ValueError(f"{name}: expected [{rows[-1]}, {width}], found {list(array.shape)}")
    return array


@lru_cache(maxsize=1024)
def _packed(spec: RouterSpec) -> NDArray[np.float64]:
    return pack(spec)[None]


def _library() -> ctypes.CDLL:
    from moescope.kernels.native_ops import library

    found = library()
    if found is None:
        raise RuntimeError("backend native: its library was not built, or is switched off")
    return declare(found)


@lru_cache(maxsize=8)
def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take and give."""
    library.mk_route_rows.argtypes, library.mk_route_rows.restype = _ROUTE_ROWS, None
    library.mk_route_isas.argtypes, library.mk_route_isas.restype = (), _INT
    library.mk_route_scratch.argtypes, library.mk_route_scratch.restype = (_INT,), ctypes.c_size_t
    return library
