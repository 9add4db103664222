"""MiMo-V2-Flash: sliding layers with sinks and twice the key heads, values narrower than keys.

Source: transformers `modeling_mimo_v2_flash.py`. The published config says by `sliding_window_size`
how many earlier tokens a query sees beside itself, and by `hybrid_layer_pattern` (1: sliding) and
`moe_layer_freq` (1: sparse) what each layer is.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.deepseek import MASK_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import Attention, Rope

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = {FULL: 5e6, SLIDING: 1e4}
PARTIAL = 0.334

NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention.sinks": (".sinks", ".attention_sink_bias"),
    "unread": ("model.mtp.*",),
}


def mimo_v2_flash(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(
        config, eps=1e-5, context=131072, kv_heads=4, head_dim=192, width=16384
    )
    mixers = {kind: _attention(config, sizes, kind) for kind in (FULL, SLIDING)}
    router = biased.read_router(config, biased.Usual(shared=0))
    moe, dense = biased.read_moe(config, sizes, router), biased.read_dense(config, sizes)
    sparse = _flags(config, "moe_layer_freq", sizes.layers)
    if sparse is None:
        sparse = biased.typed_layers(config, sizes.layers, 1)
    chosen = [mixers[kind] for kind in _layer_types(config, sizes.layers)]
    return biased.decoder(sizes, chosen, biased.blocks(sparse, moe, dense))


def _layer_types(config: Fields, layers: int) -> list[str]:
    types = config.list("layer_types", str, layers, default=None)
    if types is None:
        slides = _flags(config, "hybrid_layer_pattern", layers)
        if slides is None:
            slides = [n > 0 and (n + 1) % 6 != 0 for n in range(layers)]
        return [SLIDING if flag else FULL for flag in slides]
    if unknown := set(types) - {FULL, SLIDING}:
        raise config.error("layer_types", f"{FULL} or {SLIDING}, not {sorted(unknown)[0]}")
    return list(types)


def _flags(config: Fields, name: str, layers: int) -> list[bool] | None:
    """A list of 0 and 1, None where the config has none."""
    found = config.list(name, int, layers, default=None)
    if found is not None and set(found) - {0, 1}:
        raise config.error(name, "0 or 1 for each layer")
    return None if found is None else [bool(flag) for flag in found]


def _attention(config: Fields, sizes: common.Sizes, kind: str) -> Attention:
    slides = kind == SLIDING
    bias = config.bool("attention_bias", False)
    scale = config.float("attention_value_scale", default=1.0)
    if "attention_value_scale" not in config.values:
        scale = 0.707
    return Attention(
        sizes.hidden,
        sizes.heads,
        _kv_heads(config, sizes, slides),
        sizes.head_dim,
        sizes.head_dim**-0.5,
        _rope(config, sizes, kind),
        window=_window(config) if slides else 0,
        v_head_dim=config.int("v_head_dim", 1, common.COUNT, 128),
        qkv_bias=bias,
        sinks=slides,
        value_scale=scale,
    )


def _kv_heads(config: Fields, sizes: common.Sizes, slides: bool) -> int:
    count = 2 * sizes.kv_heads if slides else sizes.kv_heads
    if slides and config.int("swa_num_key_value_heads", 1, common.COUNT, count) != count:
        raise config.error("swa_num_key_value_heads", f"twice num_key_value_heads, {count}")
    if sizes.heads % count:
        raise config.error("num_attention_heads", f"a multiple of {count} key heads")
    return count


def _window(config: Fields) -> int:
    """With `sliding_window_size` a query sees so many tokens and itself; `sliding_window` counts
    itself."""
    size = config.int("sliding_window_size", 1, 1 << 30, None)
    return config.int("sliding_window", 1, 1 << 30, 129) if size is None else size + 1


def _rope(config: Fields, sizes: common.Sizes, kind: str) -> Rope:
    source = ropes.rope_of_type(config, kind)
    if source is None and kind == SLIDING:
        source = Fields({"rope_theta": config.float("swa_rope_theta", 1.0, 1e15, THETA[kind])})
    if source is None:
        source = Fields({"rope_theta": config.float("rope_theta", 1.0, 1e15, THETA[kind])})
    return ropes.read_rope(config, sizes.head_dim, sizes.context, partial=PARTIAL, source=source)


FAMILIES = {
    "mimo_v2_flash": Family(
        "MiMo-V2-Flash",
        mimo_v2_flash,
        NAMES,
        "renormalised sigmoid, biased choice",
        notes=(MASK_NOTE,),
    ),
}
