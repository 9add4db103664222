"""Every packed form that is tested: how to make it, what a config says of it, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moescope.engine import quantised
from moescope.engine.header import TensorInfo
from moescope.engine.quantised import numbers
from moescope.engine.quantised.formats import FORMATS
from tests.engine.packing import (
    Made,
    affine,
    awq,
    fp8,
    gptq,
    mlx_float,
    mxfp4_packed,
    nvfp4,
    packed_integers,
)


def weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """The config of one group of compressed-tensors."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def compressed(format: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        **more,
    }


@dataclass(frozen=True)
class Form:
    """One way of packing: how to make it, and what a config says of it."""

    make: Callable[..., Made]
    format: str  # as `quantised.FORMATS` calls it
    config: dict[str, Any]
    key: str = "quantization_config"


def _mlx(make: Callable[..., Made], mode: str, bits: int, group: int) -> Form:
    config = {"group_size": group, "bits": bits, "mode": mode}
    return Form(make, f"mlx {mode}", config, "quantization")


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_GPTQ = {"quant_method": "gptq", "sym": False, "desc_act": True}

FORMS: dict[str, Form] = {
    **{
        f"mlx-{bits}-bit-g{group}": _mlx(affine(bits, group), "affine", bits, group)
        for bits, group in ((2, 32), (3, 64), (4, 32), (5, 32), (6, 64), (8, 64))
    },
    "mlx-4-bit-bf16": _mlx(affine(4, 64, torch.bfloat16), "affine", 4, 64),
    "mlx-mxfp4": _mlx(mlx_float("mxfp4", 4, 32), "mxfp4", 4, 32),
    "mlx-mxfp8": _mlx(mlx_float("mxfp8", 8, 32), "mxfp8", 8, 32),
    "mlx-nvfp4": _mlx(mlx_float("nvfp4", 4, 16), "nvfp4", 4, 16),
    "fp8-128": Form(
        fp8(128, 128, ".weight_scale_inv"), "FP8", {**_FP8, "weight_block_size": [128, 128]}
    ),
    "fp8-ue8m0-32": Form(
        fp8(32, 32, ".weight_scale_inv", torch.float8_e8m0fnu),
        "FP8",
        {**_FP8, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
    ),
    "fp8-per-tensor": Form(fp8(0, 0, ".weight_scale"), "FP8 (weight_scale)", _FP8),
    "fp8-per-channel": Form(
        fp8(1, 0, ".weight_scale", torch.bfloat16),
        "FP8 (weight_scale)",
        compressed("float-quantized", weights(8, "float", "channel")),
    ),
    "int4-g32": Form(
        packed_integers(4, 32),
        "packed integers",
        compressed("pack-quantized", weights(4, "int", "group", group_size=32)),
    ),
    "int4-zeros": Form(
        packed_integers(4, 32, zeros=True),
        "packed integers",
        compressed("pack-quantized", weights(4, "int", "group", group_size=32, symmetric=False)),
    ),
    "int8-per-channel": Form(
        packed_integers(8, 0),
        "packed integers",
        compressed("pack-quantized", weights(8, "int", "channel")),
    ),
    "int3-ordered": Form(
        packed_integers(3, 32, ordered=True),
        "packed integers",
        compressed("pack-quantized", weights(3, "int", "group", group_size=32, actorder="group")),
    ),
    "nvfp4": Form(
        nvfp4(".weight_global_scale", ".weight_packed", divides=True),
        "NVFP4",
        compressed("nvfp4-pack-quantized", weights(4, "float", "tensor_group", group_size=16)),
    ),
    "mxfp4-packed": Form(
        mxfp4_packed,
        "MXFP4 (weight_packed)",
        compressed("mxfp4-pack-quantized", weights(4, "float", "group", group_size=32)),
    ),
    "nvfp4-modelopt": Form(
        nvfp4(".weight_scale_2", ".weight", divides=False),
        "NVFP4 (ModelOpt)",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    ),
    "fp8-modelopt": Form(
        fp8(0, 0, ".weight_scale"),
        "FP8 (weight_scale)",
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    ),
    "gptq-4": Form(gptq(4, 32, less=1), "GPTQ", {**_GPTQ, "bits": 4, "group_size": 32}),
    "gptq-3-ordered": Form(
        gptq(3, 32, less=1, ordered=True), "GPTQ", {**_GPTQ, "bits": 3, "group_size": 32}
    ),
    "gptq-8-v2": Form(
        gptq(8, 0, less=0),
        "GPTQ",
        {**_GPTQ, "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Form(
        awq(32),
        "AWQ",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
}


# --- as a checkpoint has them ---------------------------------------------------------------------

DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "bfloat16": "BF16"}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """As the header of a file would have them."""
    found = {}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        short = kind.replace("uint", "U").replace("int", "I").replace("float", "F")
        dtype = DTYPES.get(kind, short)
        found[name] = TensorInfo(name, dtype, tuple(tensor.shape), 0, "x.safetensors", 0)
    return found


def made(form: Form, rows: int, columns: int, seed: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """The tensors of module `m`, and their numbers."""
    tensors, values = form.make(np.random.default_rng(seed), rows, columns)
    return {f"m{suffix}": tensor for suffix, tensor in tensors.items()}, values


def expanded(form: Form, tensors: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    held = quantised.held({form.key: form.config}, infos(tensors))
    assert len(held) == 1, sorted(held)
    (packed,) = (entry.readings[0] for entry in held.values())
    arrays = {
        role: numbers.decode(
            infos(tensors)[name].dtype,
            tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(),
            tuple(tensors[name].shape),
        )
        for role, name in packed.tensors
        if FORMATS[packed.format].roles[role].read
    }
    return quantised.expand(packed, arrays)
