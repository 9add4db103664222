"""What is launched: names, text, grid and sizes of the two Metal kernels, as data.

Letters: T tokens, P policies a token, E expert classes, K picks, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import get_args, get_type_hints

from moescope.kernels.policy_rows import COLUMNS, WIDTH
from moescope.kernels.spec import RouterPolicy

LANES = 32  # of a simdgroup
E_MAX, K_MAX = 1024, LANES
# What an int32 array of sizes holds, in this order; a step is in elements from one row to the next.
SIZES = (
    "EXPERTS",
    "MOST_PICKS",  # K_max
    "POLICIES",  # P
    "ROW_STEP",
    "HAS_BIAS",
    "BIAS_STEP",
    "HAS_SCALE",
    "SCALE_STEP",
    "HASH_STEP",
    "HASH_PICKS",  # ids of a row of the hash table, 0: there is none
    "WIDTH",  # H
    "GATE_DTYPE",  # a place in `policy_rows.DTYPES`
    "GATE_CASTS",  # whether hidden and gate are rounded to it first
    "HAS_GATE_BIAS",
)
OUTPUTS = {
    "ids": "int32",
    "scores": "float32",
    "weights": "float32",
    "score_sum": "float32",
    "mass": "float32",
    "entropy": "float32",
    "margin": "float32",
    "runner_up": "int32",
}
# Words of policies that the text names, each with the field it is a word of.
_WORDS = {
    "SIGMOID": ("scoring_func", "sigmoid"),
    "SQRTSOFTPLUS": ("scoring_func", "sqrtsoftplus"),
    "SPARSEMIXER": ("scoring_func", "sparsemixer"),
    "ON_SCORE": ("correction_bias", "score"),
    "ON_LOGIT": ("correction_bias", "logit"),
    "FROM_SCORES": ("weights_from", "scores"),
    "FROM_BIASED_MINUS_BIAS": ("weights_from", "biased_minus_bias"),
    "FROM_LOGITS": ("weights_from", "logits"),
    "CLAMP": ("norm_eps_mode", "clamp"),
    "UNIFORM": ("norm_eps_mode", "uniform"),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What `mx.fast.metal_kernel` is made of."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    header: str
    source: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel, but for its arrays: inputs stand in the order of `input_names`, the
    last of them is `sizes`."""

    kernel: Kernel
    template: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]  # in threads
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    sizes: tuple[int, ...]


def covers(E: int, K: int) -> str:
    """ "" where the kernels take E classes and K picks, else why not."""
    if E > E_MAX:
        return f"{E} experts: the Metal router takes {E_MAX}"
    return f"{K} picks: the Metal router takes {K_MAX}" if K > K_MAX else ""


def router_launch(
    T: int,
    P: int,
    E: int,
    K_max: int,
    *,
    one_row: bool = False,
    bias_rows: int = 0,
    scale_rows: int = 0,
    hash_picks: int = 0,
) -> Launch:
    """logits [T, E] under rows [T * P, 32], or one row for all; learned vectors have 0 (there is
    none), 1 or T rows, the hash table's ids are [T, hash_picks]."""
    sizes = {
        "EXPERTS": E,
        "MOST_PICKS": K_max,
        "POLICIES": P,
        "ROW_STEP": 0 if one_row else WIDTH,
        "HAS_BIAS": int(bias_rows > 0),
        "BIAS_STEP": E if bias_rows > 1 else 0,
        "HAS_SCALE": int(scale_rows > 0),
        "SCALE_STEP": E if scale_rows > 1 else 0,
        "HASH_STEP": hash_picks,
        "HASH_PICKS": hash_picks,
    }
    R = T * P
    return Launch(
        router_kernel(),
        (("PER", _per_lane(E)),),
        (LANES, R, 1),
        (LANES, 1, 1),
        (*_shapes(R, K_max),),
        tuple(OUTPUTS.values()),
        _sizes(sizes),
    )


def gate_router_launch(
    P: int,
    E: int,
    H: int,
    K_max: int,
    *,
    router_dtype: int,
    casts: bool,
    one_row: bool = False,
    has_gate_bias: bool = False,
    has_bias: bool = False,
    has_scale: bool = False,
    hash_picks: int = 0,
    simdgroups: int = 16,
) -> Launch:
    """hidden [H] through the gate [E, H] under rows [P, 32], or one row; `router_dtype` is a place
    in `policy_rows.DTYPES`."""
    sizes = {
        "EXPERTS": E,
        "MOST_PICKS": K_max,
        "POLICIES": P,
        "ROW_STEP": 0 if one_row else WIDTH,
        "HAS_BIAS": int(has_bias),
        "HAS_SCALE": int(has_scale),
        "HASH_PICKS": hash_picks,
        "WIDTH": H,
        "GATE_DTYPE": router_dtype,
        "GATE_CASTS": int(casts),
        "HAS_GATE_BIAS": int(has_gate_bias),
    }
    return Launch(
        gate_router_kernel(),
        (("PER", _per_lane(E)),),
        (LANES * simdgroups, 1, 1),
        (LANES * simdgroups, 1, 1),
        (*_shapes(P, K_max), (E,)),
        (*OUTPUTS.values(), "float32"),
        _sizes(sizes),
    )


@lru_cache(maxsize=1)
def router_kernel() -> Kernel:
    return Kernel(
        "moescope_router",
        ("logits", "rows", "bias", "scale", "hashed", "sizes"),
        tuple(OUTPUTS),
        _header("numbers.metal", "scores.metal", "routing.metal"),
        _text("router.metal"),
    )


@lru_cache(maxsize=1)
def gate_router_kernel() -> Kernel:
    return Kernel(
        "moescope_gate_router",
        ("hidden", "gate", "gate_bias", "rows", "bias", "scale", "hashed", "sizes"),
        (*OUTPUTS, "logits"),
        _header("numbers.metal", "gate.metal", "scores.metal", "routing.metal"),
        _text("gate_router.metal"),
    )


def _header(*names: str) -> str:
    return "\n".join([_names(), *map(_text, names)])


def _names() -> str:
    """Columns, words and sizes as the text names them, so that they are said in one place."""
    hints = get_type_hints(RouterPolicy)
    words = {name: get_args(hints[field]).index(word) for name, (field, word) in _WORDS.items()}
    tables = (
        {name.upper(): place for place, name in enumerate(COLUMNS)},
        words,
        {name: place for place, name in enumerate(SIZES)},
    )
    enums = (", ".join(f"{name} = {n}" for name, n in table.items()) for table in tables)
    return "\n".join(["namespace moescope {", *(f"enum : int {{ {e} }};" for e in enums), "}"])


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return files("moescope.kernels.metal").joinpath(name).read_text(encoding="utf-8")


def _per_lane(E: int) -> int:
    """Classes a lane holds: a power of two, so that few sizes are ever compiled."""
    return 1 << max(0, -(-E // LANES) - 1).bit_length()


def _shapes(R: int, K_max: int) -> list[tuple[int, ...]]:
    per_row = {"ids": (R, K_max), "scores": (R, K_max), "weights": (R, K_max)}
    return [per_row.get(name, (R,)) for name in OUTPUTS]


def _sizes(values: dict[str, int]) -> tuple[int, ...]:
    return tuple(values.get(name, 0) for name in SIZES)
