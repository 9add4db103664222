"""Mixtral: always renormalised, combine weights left in float32, a sliding window where set."""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.families.family import Family, NoteIf
from moescope.engine.families.names import PRE_NORM_NAMES
from moescope.engine.operators import MoE


def mixtral(config: Fields) -> DecoderSpec:
    """arXiv 2401.04088; transformers `modeling_mixtral.py`. Jitter is for training only."""
    sizes = common.read_sizes(config, eps=1e-5, context=131072, kv_heads=8)
    rope = common.read_rope(config, sizes, usual_theta=1e6)
    mixer = common.attention(sizes, rope, window=config.int("sliding_window", 1, 1 << 30, 0))
    router = common.softmax_router(config, renormalises=True, combine="float32")
    moe = MoE(sizes.hidden, router, common.experts(config, sizes.width))
    return common.decoder(sizes, [common.pre_norm_layer(sizes, mixer, moe)] * sizes.layers)


_LOCAL = {"moe_intermediate_size": "intermediate_size", "num_experts": "num_local_experts"}
_WINDOW = NoteIf(
    "mlx-lm (0.32) ignores sliding_window; transformers, and moescope, see no further back",
    lambda config: config.has("sliding_window"),
)
FAMILIES = {
    "mixtral": Family(
        "Mixtral", mixtral, PRE_NORM_NAMES, "always renormalised", _LOCAL, (_WINDOW,)
    ),
}
