"""dots.llm1 and K-EXAONE: DeepSeek-V3's router over grouped attention with windows.

Sources: arXiv 2506.05767; transformers `modeling_dots1.py` and `modeling_exaone_moe.py`.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import biased, common
from moescope.engine.families.biased import Usual
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.deepseek import MASK_NOTE
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES

WIDTH = 4096  # of a window, where the config is silent


def dots1(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=2048, kv_heads=32)
    bias = config.bool("attention_bias", False)
    mixer = common.attention(
        sizes,
        common.read_rope(config, sizes),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
    )
    window = read_window(config)
    below = config.int("max_window_layers", 0, 1024, 62)
    usual = [SLIDING if window and number >= below else FULL for number in range(sizes.layers)]
    types = _types(config, sizes.layers, usual, window)
    mixers = [replace(mixer, window=window if kind == SLIDING else 0) for kind in types]
    usual_router = Usual(renormalises=False, shared=0)
    moe = biased.read_moe(config, sizes, biased.read_router(config, usual_router))
    sparse = biased.first_dense(config, sizes.layers, 0)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, mixers, blocks)


def exaone_moe(config: Fields) -> DecoderSpec:
    """Where there are windows, layers without one have no positions either."""
    sizes = common.read_sizes(config, eps=1e-5, context=2048, kv_heads=32)
    rope = common.read_rope(config, sizes)
    sliding = common.attention(sizes, rope, window=read_window(config), qk_norm="per_head")
    full = replace(sliding, window=0, rope=None if sliding.window else rope)
    usual = _pattern(config, sizes.layers) if not config.has("layer_types") else []
    types = _types(config, sizes.layers, usual, sliding.window)
    mixers = [sliding if kind == SLIDING else full for kind in types]
    moe = biased.read_moe(config, sizes, biased.read_router(config, Usual(scale=2.5, chosen=8)))
    sparse = biased.typed_layers(config, sizes.layers, 1)
    blocks = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    return biased.decoder(sizes, mixers, blocks)


def read_window(config: Fields) -> int:
    """0 for null; an absent one is the usual."""
    null = "sliding_window" in config.values and not config.has("sliding_window")
    return 0 if null else config.int("sliding_window", 1, 1 << 30, WIDTH)


def _types(config: Fields, layers: int, usual: list[str], window: int) -> list[str]:
    types = common.read_layer_types(config, layers, (FULL, SLIDING), usual)
    if SLIDING in types and not window:
        raise config.error("layer_types", f"no {SLIDING} where sliding_window is null")
    return types


def _pattern(config: Fields, layers: int) -> list[str]:
    """Every so many layers a full one. Words such as LLLG go with `layer_types`, which say more."""
    every = config.int("sliding_window_pattern", 1, 1024, 4)
    return [SLIDING if (number + 1) % every else FULL for number in range(layers)]


_ROUTED = "sigmoid, biased choice, renormalised and scaled"
_KEYS = {"num_experts": "n_routed_experts"}
FAMILIES = {
    "dots1": Family("dots.llm1", dots1, PRE_NORM_NAMES, _ROUTED, _KEYS, notes=(MASK_NOTE,)),
    "exaone_moe": Family("K-EXAONE", exaone_moe, PRE_NORM_NAMES, _ROUTED, notes=(MASK_NOTE,)),
}
