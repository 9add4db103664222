"""The table of packed formats: which published tensors each consists of, and what they stand for.

`expand` gives the numbers of one matrix or a stack of them, in float32. Everything is checked by
`settings` and `unpacked` before, from names, dtypes and shapes; only what lies in the data is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moescope.engine.quantised import floats, integers, mlx
from moescope.engine.quantised.numbers import Array
from moescope.engine.quantised.packed import Packed

Arrays = Mapping[str, Array]
_FLOATS = ("F32", "BF16", "F16")
_BYTES, _WORDS, _SIGNED = ("U8",), ("U32",), ("I32",)
_E4M3, _E8M0 = ("F8_E4M3",), ("F8_E8M0", "U8")


@dataclass(frozen=True, slots=True)
class Role:
    """One of a format's tensors: the ending of its name and the dtypes it may have."""

    suffix: str
    dtypes: tuple[str, ...]
    required: bool = True
    read: bool = True  # needed for the numbers, and not only said beside them


@dataclass(frozen=True, slots=True)
class Format:
    """`title` is what it is called in short, `value` what a number is, `writer` whose format it is.

    `roles` by name; the first marks a tensor as packed. What they stand for is called by their
    names with `ending` for the suffix. `by_rows`: some rows of it need the same of each tensor that
    has as many, so that a large matrix can be expanded piece by piece.
    """

    title: str
    value: str
    writer: str
    roles: Mapping[str, Role]
    expand: Callable[[Packed, Arrays], Array]
    ending: str = ".weight"
    by_rows: bool = True


def _mlx(title: str, value: str, expand: Callable[[Packed, Arrays], Array], *extra: str) -> Format:
    kinds = {
        "biases": Role(".biases", _FLOATS),
        "global_scale": Role(".global_scale", ("F32",), False),
    }
    scales = _FLOATS if "biases" in extra else _BYTES
    roles = {"scales": Role(".scales", scales), "weight": Role(".weight", _WORDS)}
    return Format(
        title, value, "mlx-lm", {**roles, **{name: kinds[name] for name in extra}}, expand
    )


def _gptq(
    title: str, value: str, writer: str, expand: Callable[[Packed, Arrays], Array], **extra: Role
) -> Format:
    roles = {
        "weight": Role(".qweight", _SIGNED),
        "zeros": Role(".qzeros", _SIGNED),
        "scales": Role(".scales", _FLOATS),
        **extra,
    }
    return Format(title, value, writer, roles, expand, by_rows=False)


def _bytes(
    title: str,
    value: str,
    expand: Callable[[Packed, Arrays], Array],
    scale: tuple[str, ...],
    whole: bool,
) -> Format:
    """compressed-tensors: two values of 4 bits in a byte."""
    roles = {"weight": Role(".weight_packed", _BYTES), "scale": Role(".weight_scale", scale)}
    if whole:
        roles["global_scale"] = Role(".weight_global_scale", ("F32",))
    return Format(title, value, "compressed-tensors", roles, expand)


FORMATS: dict[str, Format] = {
    "mlx affine": _mlx("{bits}-bit affine", "scale × code + bias", mlx.affine, "biases"),
    "mlx mxfp4": _mlx("MXFP4", "E2M1 × 2^(scale − 127)", mlx.mxfp4),
    "mlx mxfp8": _mlx("MXFP8", "E4M3 × 2^(scale − 127)", mlx.mxfp8),
    "mlx nvfp4": _mlx("NVFP4", "E2M1 × E4M3 scale (× global / 2688)", mlx.nvfp4, "global_scale"),
    "MXFP4": Format(
        "MXFP4",
        "E2M1 × 2^(scale − 127)",
        "gpt-oss",
        {"weight": Role("_blocks", _BYTES), "scales": Role("_scales", _E8M0)},
        floats.mxfp4_blocks,
        ending="",
    ),
    "FP8": Format(
        "FP8",
        "E4M3 × scale",
        "DeepSeek and others, in blocks",
        {
            "scale": Role("_scale_inv", (*_FLOATS, *_E8M0)),
            "weight": Role("", _E4M3),
        },
        floats.fp8,
        ending="",
    ),
    "FP8 (weight_scale)": Format(
        "FP8",
        "E4M3 × scale",
        "compressed-tensors (float-quantized), ModelOpt, FP8 per tensor",
        {
            "scale": Role(".weight_scale", _FLOATS),
            "weight": Role(".weight", _E4M3),
        },
        floats.fp8,
    ),
    "packed integers": Format(
        "{bits}-bit integers",
        "(code − zero) × scale",
        "compressed-tensors (pack-quantized)",
        {
            "weight": Role(".weight_packed", _SIGNED),
            "scale": Role(".weight_scale", _FLOATS),
            "zero_point": Role(".weight_zero_point", _SIGNED, required=False),
            "g_idx": Role(".weight_g_idx", _SIGNED, required=False),
            "shape": Role(".weight_shape", ("I64", "I32"), required=False, read=False),
        },
        integers.packed_integers,
        by_rows=False,
    ),
    "NVFP4": _bytes("NVFP4", "E2M1 × E4M3 scale / global", floats.nvfp4_divided, _E4M3, True),
    "MXFP4 (weight_packed)": _bytes("MXFP4", "E2M1 × 2^(scale − 127)", floats.mxfp4, _E8M0, False),
    "NVFP4 (ModelOpt)": Format(
        "NVFP4",
        "E2M1 × E4M3 scale × global",
        "ModelOpt",
        {
            "global_scale": Role(".weight_scale_2", ("F32",)),
            "scale": Role(".weight_scale", _E4M3),
            "weight": Role(".weight", _BYTES),
        },
        floats.nvfp4_multiplied,
    ),
    "GPTQ": _gptq(
        "{bits}-bit GPTQ",
        "(code − zero) × scale",
        "AutoGPTQ, GPTQModel",
        integers.gptq,
        g_idx=Role(".g_idx", _SIGNED, required=False),
    ),
    "AWQ": _gptq("{bits}-bit AWQ", "(code − zero) × scale", "AutoAWQ (gemm)", integers.awq),
}


def expand(packed: Packed, arrays: Arrays) -> Array:
    """The numbers, float32 in the shape of `arrays`: all of `packed.shape`, or those rows or those
    of its stack that the arrays are of. Arrays are as `numbers.decode` gives them, and may be
    written over. MoescopeError where the data itself is wrong."""
    with np.errstate(all="ignore"):  # scales of strangers may overflow; who reads them counts
        return FORMATS[packed.format].expand(packed, arrays)


def words(packed: Packed) -> str:
    """`8-bit affine g64`, `FP8 128×128`."""
    return f"{FORMATS[packed.format].title.format(bits=packed.bits)} {packed.sharing()}"
