"""What a config says of quantised weights, read strictly: unknown methods, formats and keys are
refused by name, because a scale taken for something else gives fluent, wrong text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from moescope.engine.config import Fields
from moescope.engine.quantised import compressed, floats, integers, mlx
from moescope.engine.quantised.scheme import (
    ACTIVATIONS,
    MODELOPT_FILE,
    MOST,
    Rule,
    Scheme,
    expect_known,
    group_size,
    names,
    one_of,
)
from moescope.engine.towers import parts_of

# in the whole, or in what it says of its text
KEYS = ("quantization_config", "quantization", "compression_config")


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config, None where its weights are as they are. Raises MoescopeError naming
    key and value for whatever is not implemented."""
    found = _block(config) or _beside(config)
    if found is None:
        return None
    if "quant_method" not in found.values and ("bits" in found.values or "mode" in found.values):
        return _mlx(found)
    method = found.str("quant_method", tuple(METHODS))
    return METHODS[method](found)


def _block(config: Mapping[str, Any]) -> Fields | None:
    """The object that says how weights are packed. mlx-lm writes its own under two names, and may
    keep that of the checkpoint it started from under one of them: its own counts."""
    for holder in map(Fields, parts_of(config)):
        own = holder.fields("quantization") if holder.has("quantization") else None
        if own is not None and "quant_method" not in own.values:
            return own
        for key in KEYS:
            if (found := holder.fields(key)) is not None and found.values:
                return found
    return None


def _beside(config: Mapping[str, Any]) -> Fields | None:
    """What ModelOpt's own file says, where `config.json` says nothing."""
    whole = Fields(config).fields(MODELOPT_FILE)
    if whole is None:
        return None
    own = Fields(whole.values, MODELOPT_FILE)
    block = own.fields("quantization")
    if block is None:
        raise own.error("quantization", "an object")
    if not block.has("quant_algo"):
        return None  # a cache of keys and values in fewer bits, if anything
    return Fields({**block.values, "quant_method": "modelopt"}, block.file, block.prefix)


# --- mlx ------------------------------------------------------------------------------------------

_MLX_KEYS = ("group_size", "bits", "mode", "quant_method")
_MLX_USUAL = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def _mlx(block: Fields) -> Scheme:
    """`{"group_size", "bits", "mode", "<module>": {..} | true | false}`."""
    whole = _mlx_pair(block)
    rules, plain = [], []
    for path, value in block.values.items():
        if path in _MLX_KEYS:
            continue
        if value is False:
            plain.append(path)
        elif isinstance(value, Mapping):
            inner = Fields(value, block.file, f"{block.prefix}{path}.")
            expect_known(inner, "mode bits group_size global_scale")
            rules.append(_mlx_rule(_mlx_pair(inner), path))
        elif value is not True:
            raise block.error(path, "an object, true or false")
    # A path that is not listed is read by its shapes: mlx-lm infers what the config leaves open.
    every = [(mode, *pair) for mode, pairs in mlx.PAIRS.items() for pair in pairs]
    rules += [_mlx_rule(how) for how in dict.fromkeys([whole, *every])]
    return Scheme("mlx", tuple(rules), tuple(plain), f"{block.file}: {block.prefix.rstrip('.')}")


def _mlx_pair(block: Fields) -> tuple[str, int, int]:
    """(mode, bits, group size). What one path leaves out is as usual for its mode, and not as it is
    for the others: so mlx reads its own."""
    mode = block.str("mode", tuple(mlx.PAIRS), default="affine")
    usual = _MLX_USUAL[mode]
    bits = block.int("bits", 1, 8, usual[0])
    size = block.int("group_size", 1, 1024, usual[1])
    allowed = mlx.PAIRS[mode]
    if bits not in {pair[0] for pair in allowed}:
        raise block.error("bits", one_of(pair[0] for pair in allowed))
    if (bits, size) not in allowed:
        raise block.error("group_size", one_of(pair[1] for pair in allowed))
    return mode, bits, size


def _mlx_rule(how: tuple[str, int, int], path: str | None = None) -> Rule:
    mode, bits, size = how
    return Rule(f"mlx {mode}", partial(mlx.readings, mode=mode, pair=(bits, size)), path)


# --- methods of `quant_method` --------------------------------------------------------------------


def _mxfp4(block: Fields) -> Scheme:
    expect_known(block, "modules_to_not_convert dequantize")
    rule = Rule("MXFP4", floats.mxfp4_blocks_readings)
    return Scheme("MXFP4", (rule,), *names(block, "modules_to_not_convert"))


_WEIGHT_SCALE = "FP8 (weight_scale)"


def _fp8_rule(rows: int, columns: int, name: str = _WEIGHT_SCALE) -> Rule:
    return Rule(name, partial(floats.fp8_readings, rows=rows, columns=columns))


_FP8_KEYS = """
    weight_block_size activation_scheme fmt scale_fmt expert_dtype dequantize
    modules_to_not_convert modules_to_convert ignored_layers
"""


def _fp8(block: Fields) -> Scheme:
    """Blocks by `weight_block_size`; without it, one scale for a row or a tensor."""
    expect_known(block, _FP8_KEYS)
    block.str("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    block.str("scale_fmt", ("float", "ue8m0"), default="float")
    block.str("expert_dtype", ("fp8",), default="fp8")
    block.str("activation_scheme", ("dynamic", "static"), default="dynamic")
    sizes = block.list("weight_block_size", int, 2, default=None)
    if sizes is not None and not all(1 <= size <= MOST for size in sizes):
        raise block.error("weight_block_size", "two positive integers")
    rules = [
        _fp8_rule(rows, columns, name)
        for rows, columns in ([sizes] if sizes else [(1, 0), (0, 0)])
        for name in ("FP8", _WEIGHT_SCALE)
    ]
    plain, listed = names(block, "modules_to_not_convert", "ignored_layers")
    return Scheme("FP8", tuple(rules), plain, listed, (ACTIVATIONS.format("FP8"),))


_GPTQ_KEYS = """
    bits group_size sym desc_act act_order checkpoint_format format dynamic lm_head pack_dtype
    modules_in_block_to_quantize block_name_to_quantize module_name_preceding_first_block
    damp_percent damp_auto_increment true_sequential static_groups meta quantizer dataset version
    model_name_or_path model_file_base_name model_seqlen batch_size pad_token_id tokenizer uuid
    backend use_cuda_fp16 use_exllama exllama_config max_input_length cache_block_outputs
"""


def _gptq(block: Fields) -> Scheme:
    """`dynamic` may give modules bits of their own; which have them is told by their shapes."""
    expect_known(block, _GPTQ_KEYS)
    usual = _gptq_bits(block, 4), group_size(block, default=128)
    version = block.str(
        ("checkpoint_format", "format"),
        (integers.GPTQ_V1, integers.GPTQ_V2),
        default=integers.GPTQ_V1,
    )
    block.str("pack_dtype", ("int32",), default="int32")
    choices = {usual: None}
    modules = block.fields("dynamic")
    for path in modules.values if modules is not None else ():
        assert modules is not None
        inner = modules.fields(path)
        if inner is not None and not path.startswith("-:"):
            size = group_size(inner, default=usual[1] or -1)
            choices[_gptq_bits(inner, usual[0]), size] = None
    read = partial(integers.gptq_readings, variant=version)
    rules = [Rule("GPTQ", partial(read, bits=bits, size=size)) for bits, size in choices]
    return Scheme("GPTQ", tuple(rules))


def _gptq_bits(block: Fields, default: int) -> int:
    bits = block.int("bits", 1, 8, default)
    if bits not in integers.GPTQ_BITS:
        raise block.error("bits", one_of(integers.GPTQ_BITS))
    return bits


_AWQ_KEYS = """
    bits w_bit group_size q_group_size version zero_point backend modules_to_not_convert
    ignore do_fuse exllama_config fuse_max_seq_len modules_to_fuse
"""


def _awq(block: Fields) -> Scheme:
    expect_known(block, _AWQ_KEYS)
    if block.int(("bits", "w_bit"), 1, 8, 4) != 4:
        raise block.error(("bits", "w_bit"), "4")
    block.str("version", ("gemm", "GEMM"), default="gemm")
    if not block.bool("zero_point", True):
        raise block.error("zero_point", "true")
    key = "q_group_size" if block.has("q_group_size") else "group_size"
    rule = Rule("AWQ", partial(integers.awq_readings, bits=4, size=group_size(block, key, 128)))
    return Scheme("AWQ", (rule,), *names(block, "modules_to_not_convert", "ignore"))


_MODELOPT_KEYS = """
    quant_algo group_size exclude_modules ignore kv_cache_quant_algo kv_cache_scheme producer
    config_groups quantized_layers
"""
_NVFP4 = Rule("NVFP4 (ModelOpt)", partial(floats.fp4_readings, size=16, whole=True))
# algorithm -> (how its weights are packed, what activations it is made for)
_MODELOPT: dict[str, tuple[Rule, str]] = {
    "NVFP4": (_NVFP4, "NVFP4"),
    "W4A16_NVFP4": (_NVFP4, ""),
    "FP8": (_fp8_rule(0, 0), "FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": (_fp8_rule(1, 0), "FP8"),
}
_MIXED = "MIXED_PRECISION"


def _modelopt(block: Fields) -> Scheme:
    """One algorithm, or one for each of the layers it lists; which have which is told by their
    shapes and dtypes."""
    expect_known(block, _MODELOPT_KEYS)
    algorithm = block.str("quant_algo", (*_MODELOPT, _MIXED))
    found = {algorithm: None}
    if algorithm == _MIXED:
        layers = block.fields("quantized_layers")
        if layers is None or not layers.values:
            raise block.error("quantized_layers", "an object of layers")
        found = dict.fromkeys(_modelopt_layer(layers, path) for path in layers.values)
    elif group_size(block, default=16) != 16:
        raise block.error("group_size", "16")
    chosen = [_MODELOPT[name] for name in found if name]
    plain, listed = names(block, "exclude_modules", "ignore")
    notes = dict.fromkeys(ACTIVATIONS.format(kind) for _, kind in chosen if kind)
    rules = dict.fromkeys(rule for rule, _ in chosen)
    return Scheme("ModelOpt", tuple(rules), plain, listed, tuple(notes))


def _modelopt_layer(layers: Fields, path: str) -> str:
    """The algorithm of one layer of a mixed checkpoint; nothing where it is as it is."""
    inner = layers.fields(path)
    if inner is None:
        raise layers.error(path, "an object")
    expect_known(inner, "quant_algo group_size")
    found = inner.str("quant_algo", (*_MODELOPT, "UNQUANTIZED"))
    if _MODELOPT.get(found, (None,))[0] is _NVFP4 and group_size(inner, default=16) != 16:
        raise inner.error("group_size", "16")
    return found if found in _MODELOPT else ""


METHODS: dict[str, Callable[[Fields], Scheme]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": compressed.read_groups,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
}
