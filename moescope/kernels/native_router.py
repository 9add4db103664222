"""The router in C (`native/router.c`) on numpy arrays: one row of logits at a time, on the CPU.

Same contract as `reference.py`, whose semantics the C code has row for row. A fused decode step
calls the C function itself; this is the way in for `kernels.route`, tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.policy_rows import pack
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

    Learned vectors are [1, E] or [T, E], hash ids [T, K]. Returns ids int32 and scores and weights
    float32 [T, P, K_max], score sum, mass, entropy and margin float32 [T, P, 4], and runners-up
    int32 [T, P]. `isa` is -1 for the widest instruction set this machine has, else a place among
    the `instruction_sets()`. Rows whose policy does not fit come back invalid.
    """
    T, E = logits.shape
    P = row_of.shape[1]
    if row_of.shape[0] != T:
        raise ValueError(f"row_of: expected [{T}, P], found {list(row_of.shape)}")
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    policies = np.ascontiguousarray(policies, dtype=np.float64)
    row_of = np.ascontiguousarray(row_of, dtype=np.int32)
    vectors = [
        _vector(correction_bias, np.float32),
        _vector(per_expert_scale, np.float32),
        _vector(hash_ids, np.int32),
    ]
    ids = np.empty((T, P, K_max), np.int32)
    scores, weights = np.empty((2, T, P, K_max), np.float32)
    scalars, runner_up = np.empty((T, P, _SCALARS), np.float32), np.empty((T, P), np.int32)
    library = _library()
    scratch = np.empty(library.mk_route_scratch(E), np.uint8)
    library.mk_route_rows(
        isa,
        *(logits.ctypes.data, E, T, E),
        *(policies.ctypes.data, len(policies), row_of.ctypes.data, P),
        *(part for array, stride in vectors for part in (_address(array), stride)),
        K_max,
        *(a.ctypes.data for a in (ids, scores, weights, scalars, runner_up, scratch)),
    )
    return ids, scores, weights, scalars, runner_up


def instruction_sets() -> tuple[str, ...]:
    """What the router can run on here, the narrowest first."""
    return ("portable", "avx2", "avx512")[: _library().mk_route_isas()]


def _vector(value: NDArray[Any] | None, dtype: Any) -> tuple[NDArray[Any] | None, int]:
    """An array as C reads it, and the stride from one row of logits to the next."""
    if value is None:
        return None, 0
    array = np.ascontiguousarray(value, dtype=dtype)
    return array, array.shape[1] if len(array) > 1 else 0


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


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
