"""The `compressed-tensors` part of a config: groups of layers, each with a format of its own.

Source: vllm-project/compressed-tensors, `quantization/quant_config.py` and `quant_args.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from moescope.engine.config import Fields
from moescope.engine.quantised import floats, integers
from moescope.engine.quantised.scheme import (
    ACTIVATIONS,
    MOST,
    Rule,
    Scheme,
    expect_known,
    group_size,
    names,
    one_of,
)

_MIXED = "mixed-precision"  # each group says its own
_KEYS = """
    config_groups format ignore sparsity_config transform_config kv_cache_scheme
    quantization_status global_compression_ratio version run_compressed
"""
_GROUP_KEYS = "targets weights format input_activations output_activations"
_WEIGHT_KEYS = """
    num_bits type symmetric strategy group_size block_structure dynamic actorder
    observer observer_kwargs scale_dtype zp_dtype
"""


def read_groups(block: Fields) -> Scheme:
    """A rule for each group; which layers are of which group is told by their shapes."""
    expect_known(block, _KEYS)
    _expect_dense(block)
    groups = block.fields("config_groups")
    if groups is None or not groups.values:
        raise block.error("config_groups", "an object of groups")
    usual = block.str("format", (*_FORMATS, _MIXED))
    rules: list[Rule] = []
    notes: dict[str, None] = {}
    for name in groups.values:
        group = groups.fields(name)
        weights = group.fields("weights") if group is not None else None
        if group is None or weights is None:
            raise groups.error(name, "an object with weights")
        expect_known(group, _GROUP_KEYS)
        kind = usual if usual != _MIXED else group.str("format", tuple(_FORMATS))
        kind = group.str("format", tuple(_FORMATS), default=kind)
        rules.append(_FORMATS[kind](weights))
        if (activations := group.fields("input_activations")) is not None:
            bits = activations.int("num_bits", 1, 16, 8)
            notes[ACTIVATIONS.format(f"{bits}-bit")] = None
    plain, listed = names(block, "ignore")
    return Scheme("compressed-tensors", tuple(rules), plain, listed, tuple(notes))


def _expect_dense(block: Fields) -> None:
    for key in ("sparsity_config", "transform_config"):
        inner = block.fields(key)
        dense = inner is None or inner.values.get("format") == "dense"
        if inner is not None and inner.values and not (key == "sparsity_config" and dense):
            raise block.error(key, "nothing: sparse and transformed weights are not implemented")


def _strategy(
    weights: Fields, kind: str, bits: tuple[int, ...], strategies: tuple[str, ...]
) -> str:
    """What shares a scale; everything else is as this format has it."""
    expect_known(weights, _WEIGHT_KEYS)
    weights.str("type", (kind,), default="int")
    if weights.int("num_bits", 1, 16, 8) not in bits:
        raise weights.error("num_bits", one_of(bits))
    if weights.bool("dynamic", False):
        raise weights.error("dynamic", "false")
    usual = "tensor"
    if weights.has("group_size"):
        usual = "group" if weights.int("group_size", -1, MOST) > 0 else "channel"
    found = weights.str("strategy", strategies, default=usual)
    if found not in strategies:
        raise weights.error("strategy", "one of " + ", ".join(strategies))
    return found


def _packed(weights: Fields) -> Rule:
    strategy = _strategy(weights, "int", integers.PACKED_BITS, ("group", "channel"))
    size = group_size(weights) if strategy == "group" else 0
    if strategy == "group" and not size:
        raise weights.error("group_size", "a positive integer")
    if not isinstance(weights.raw("actorder"), bool | None):
        weights.str("actorder", ("group", "weight", "static", "dynamic"))
    bits, zeros = weights.int("num_bits", 1, 8, 8), not weights.bool("symmetric", True)
    read = partial(integers.packed_readings, bits=bits, size=size, zeros=zeros)
    return Rule("packed integers", read)


def _float8(weights: Fields) -> Rule:
    strategy = _strategy(weights, "float", (8,), ("channel", "tensor", "block"))
    if not weights.bool("symmetric", True):
        raise weights.error("symmetric", "true")
    rows, columns = (1, 0) if strategy == "channel" else (0, 0)
    if strategy == "block":
        rows, columns = weights.list("block_structure", int, 2)
        if not (1 <= rows <= MOST and 1 <= columns <= MOST):
            raise weights.error("block_structure", "two positive integers")
    return Rule("FP8 (weight_scale)", partial(floats.fp8_readings, rows=rows, columns=columns))


def _float4(name: str, size: int, strategies: tuple[str, ...]) -> Callable[[Fields], Rule]:
    def read(weights: Fields) -> Rule:
        _strategy(weights, "float", (4,), strategies)
        if weights.int("group_size", 1, 1024, size) != size:
            raise weights.error("group_size", str(size))
        whole = "tensor_group" in strategies
        return Rule(name, partial(floats.fp4_readings, size=size, whole=whole))

    return read


_FORMATS: dict[str, Callable[[Fields], Rule]] = {
    "pack-quantized": _packed,
    "float-quantized": _float8,
    "naive-quantized": _float8,
    "nvfp4-pack-quantized": _float4("NVFP4", 16, ("tensor_group", "group")),
    "mxfp4-pack-quantized": _float4("MXFP4 (weight_packed)", 32, ("group",)),
}
