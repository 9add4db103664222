"""The C library of kernels (`native/`): found beside the package, opened, its structs named.

It is built at installation where a C compiler is there; where it is not, `library` gives None and
callers take the torch path. `MOESCOPE_NATIVE=0` does the same; `MOESCOPE_ISA` names one of
`instruction_sets` instead of the best this CPU has. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ABI = 4
GATES = 17  # a gate as stored, and rounded to 2 to 16 bits
DTYPES = ("float32", "bfloat16", "float16")
INSTRUCTION_SETS = ("avx512-bf16", "avx512", "avx2", "portable")

# Places in `enum mk_kind`, and flags.
KINDS = (
    *("embed", "norm", "linear", "clip", "scale", "warm", "copy", "gated", "turn", "store"),
    *("attend", "merge", "absorb", "expand", "add", "gate", "route", "keep", "experts", "down"),
    *("combine", "head", "expect"),
)
FIRST, WIDE, CENTRED, WEIGHT_FIRST, PAIRS, SOFTPLUS, POWER, ONE_LESS = (1 << n for n in range(8))
SUM, FINISH, NULL, AVERAGE, SHARES, ROUNDED = (1 << n for n in range(8, 14))
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")

_INTEGERS = (
    "kind flags x y z rows cols at groups step to to_step heads kv_heads head_dim v_dim key_step "
    "value_step window chunk turned switch_at router classes experts logits_dtype shared_width "
    "shared_rows"
)
_NUMBERS = "number eps keeps cap floor"
_POINTERS = (
    "weight bias shared_up shared_down shared_gate shared_up_bias shared_down_bias gates "
    "correction_bias per_expert_scale sinks keys values cos sin"
)
ACT = np.dtype(
    [(name, np.int32) for name in ("kind", "gated", "after")]
    + [(name, np.float32) for name in ("limit", "alpha", "shift")]
)  # struct mk_act
OP = np.dtype(
    [(name, np.int32) for name in _INTEGERS.split()]
    + [(name, np.float32) for name in _NUMBERS.split()]
    + [(name, ACT) for name in ("act", "shared_act")]
    + [(name, np.uintp) for name in _POINTERS.split()],
    align=True,
)  # struct mk_op

_pointer, _int, _text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p


class Record(ctypes.Structure):
    """struct mk_record: where routing is written."""

    _fields_ = (
        ("policies", _pointer),
        ("places", _int),
        ("routers", _int),
        ("width", _int),
        ("logits_width", _int),
        ("expert_ids", _pointer),
        ("runner_up", _pointer),
        ("scores", _pointer),
        ("weights", _pointer),
        ("scalars", _pointer),
        ("level", _int),
        ("picks", _int),
        ("ints", _pointer),
        ("floats", _pointer),
    )


class Expected(ctypes.Structure):
    """struct mk_expected: what rows of logits say."""

    _fields_ = (
        ("count", _int),
        *((name, _pointer) for name in ("log_sum", "ids", "values", "next", "told", "rank")),
    )


class Logits(ctypes.Structure):
    """struct mk_logits: rows of logits in memory."""

    _fields_ = (
        ("from", _pointer),
        *((name, ctypes.c_int64) for name in ("rows", "n", "stride")),
        ("dtype", _int),
    )


_EXPERTS_INTEGERS = "tokens picks experts hidden width weight_first"
_EXPERTS_POINTERS = "expert_ids weights h gate_up down out"


class Experts(ctypes.Structure):
    """struct mk_experts: the experts of many rows, in bfloat16."""

    _fields_ = (
        *((name, _int) for name in _EXPERTS_INTEGERS.split()),
        *((name, _pointer) for name in _EXPERTS_POINTERS.split()),
    )


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, then arguments
    "mk_abi": (_int,),
    "mk_size_of": (ctypes.c_int64, _int),
    "mk_isa_name": (_text, _text),
    "mk_pool_create": (_pointer, _int),
    "mk_pool_destroy": (None, _pointer),
    "mk_pool_threads": (_int, _pointer),
    "mk_step_create": (
        *(_pointer, _pointer, _text, _int, _pointer, _int),
        *(_pointer, _int, _int, _int, _int),
    ),
    "mk_step_destroy": (None, _pointer),
    "mk_step_buffer": (_pointer, _pointer, _int, _pointer),
    "mk_step_run": (_int, _pointer, *(_int,) * 3, *(_pointer,) * 6),
    "mk_linear": (_int, _pointer, _text, _int, _pointer, _int, _int, _pointer, _int, _pointer),
    "mk_divergence": (
        *(ctypes.c_double, _text, _pointer, _pointer),
        *(ctypes.c_int64, ctypes.c_double, ctypes.c_double),
    ),
    "mk_experts_run": (_int, _pointer, _text, _pointer),
    "mk_expect": (_int, _pointer, _text, _pointer, _pointer),
    "mk_read": (ctypes.c_uint64, _pointer, _text, _pointer, ctypes.c_int64),
}


def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built, is of another version, or is switched off."""
    return None if os.environ.get("MOESCOPE_NATIVE") == "0" else _open()


@lru_cache(maxsize=1)
def _open() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if not path.exists():
            continue
        try:
            return _checked(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            continue
    return None


def _checked(found: ctypes.CDLL) -> ctypes.CDLL | None:
    """`found` with its functions declared, if it is what this file describes."""
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    sizes = [OP.itemsize, *map(ctypes.sizeof, (Record, Expected, Logits))]
    if found.mk_abi() != ABI or [found.mk_size_of(i) for i in range(len(sizes))] != sizes:
        return None
    return found


def available() -> str:
    """The instruction set in use (one of INSTRUCTION_SETS), or "" where there is no library or the
    CPU lacks the one that `MOESCOPE_ISA` names."""
    found = library()
    name = found.mk_isa_name(wanted_isa()) if found is not None else None
    return name.decode() if name else ""


def instruction_sets() -> tuple[str, ...]:
    """Those of INSTRUCTION_SETS that this CPU has, the best first."""
    found = library()
    if found is None:
        return ()
    return tuple(name for name in INSTRUCTION_SETS if found.mk_isa_name(name.encode()))


def wanted_isa() -> bytes:
    return os.environ.get("MOESCOPE_ISA", "").encode()


class Pool:
    """Threads that run one job at a time; whoever calls a function of it holds `lock`."""

    def __init__(self, threads: int) -> None:
        found = library()
        assert found is not None
        self.library, self.lock = found, threading.Lock()
        self.handle = found.mk_pool_create(threads)
        if not self.handle:
            raise MemoryError("no memory for threads")
        self.threads: int = found.mk_pool_threads(self.handle)


def pool(threads: int) -> Pool:
    """One pool per number of threads and process (a fork has none of its parent's threads); it
    lives as long as the process."""
    return _pool(threads, os.getpid())


@lru_cache
def _pool(threads: int, process: int) -> Pool:
    return Pool(threads)


def linear(
    x: NDArray[np.float32],
    weight: NDArray[Any],
    *,
    dtype: str | None = None,
    isa: str = "",
    threads: int = 1,
) -> NDArray[np.float32]:
    """x [N, in] times weight [out, in], rounded to the weight's dtype: [N, out].

    Weights are float32, float16, or uint16 with `dtype` "bfloat16"; x holds values of that dtype.
    """
    chosen = DTYPES.index(dtype or weight.dtype.name)
    x = np.ascontiguousarray(x, dtype=np.float32)
    assert weight.flags.c_contiguous and x.shape[1] == weight.shape[1]
    y = np.empty((len(x), len(weight)), np.float32)
    team = pool(threads)
    with team.lock:
        failed = team.library.mk_linear(
            *(team.handle, isa.encode(), chosen, weight.ctypes.data, *weight.shape),
            *(x.ctypes.data, len(x), y.ctypes.data),
        )
    if failed:
        raise MemoryError("no memory for a product")
    return y


def read_bandwidth(data: NDArray[Any], *, threads: int, isa: str = "") -> float:
    """GB/s at which the pool reads `data`, once and with nothing else done to it."""
    assert data.flags.c_contiguous
    team = pool(threads)
    with team.lock:
        start = time.perf_counter()
        team.library.mk_read(team.handle, isa.encode(), data.ctypes.data, data.nbytes)
        return data.nbytes / (time.perf_counter() - start) / 1e9


class Answers:
    """Room for what `count` of the likeliest tokens, and the partition sum, of so many rows say.

    `struct` is what C fills; the arrays keep its memory alive. With `next_ids` [rows] int64, where
    -1 is none, also the logit and the rank of the id that comes next.
    """

    def __init__(self, rows: int, count: int, next_ids: NDArray[np.int64] | None = None) -> None:
        self.log_sum = np.full(rows, np.nan)
        self.ids = np.full((rows, count), -1, np.int32)
        self.values = np.full((rows, count), np.nan, np.float32)
        self.next_ids = next_ids
        where = [array.ctypes.data for array in (self.log_sum, self.ids, self.values)]
        if next_ids is not None:
            assert next_ids.flags.c_contiguous and next_ids.dtype == np.int64
            self.told = np.full(rows, np.nan, np.float32)
            self.rank = np.zeros(rows, np.int32)
            where += [array.ctypes.data for array in (next_ids, self.told, self.rank)]
        self.struct = Expected(count, *where)


def expect(
    address: int,
    rows: int,
    size: int,
    count: int,
    *,
    dtype: str = "float32",
    next_ids: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> Answers | None:
    """What contiguous rows of logits [rows, size] at `address` say; None without a library."""
    found = library()
    if found is None:
        return None
    answers = Answers(rows, min(count, size), next_ids)
    given = Logits(address, rows, size, size, DTYPES.index(dtype))
    asked = wanted_isa(), ctypes.addressof(given), ctypes.addressof(answers.struct)
    if threads == 1:
        failed = found.mk_expect(None, *asked)
    else:
        team = pool(threads)
        with team.lock:
            failed = found.mk_expect(team.handle, *asked)
    return None if failed else answers


def divergence(
    p: NDArray[np.float32], q: NDArray[np.float32], log_sum_p: float, log_sum_q: float
) -> float | None:
    """KL(P || Q) in nats of two rows of logits [V] with their log partition sums; None without a
    library."""
    found = library()
    if found is None or not (p.flags.c_contiguous and q.flags.c_contiguous):
        return None
    where = p.ctypes.data, q.ctypes.data
    return float(found.mk_divergence(wanted_isa(), *where, len(p), log_sum_p, log_sum_q))
