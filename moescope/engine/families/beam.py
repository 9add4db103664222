"""Beam: windows with positions beside full layers without, gated attention, residuals that are
weighed by depth, and the experts' sum scaled after it is taken.

Source: transformers `modeling_beam.py`. Its activations are float32, which in bfloat16 is seen in
the last bits.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common, ropes
from moescope.engine.families.biased import Usual
from moescope.engine.families.common import FULL, SLIDING
from moescope.engine.families.family import Family
from moescope.engine.families.names import PRE_NORM_NAMES, Names
from moescope.engine.operators import MLP, Attention, MoE, Norm

WINDOW, WARMTH, FLOOR = 512, 0.1, 2048


def beam(config: Fields) -> DecoderSpec:
    sizes = common.read_sizes(config, eps=1e-6, context=8192, kv_heads=8, head_dim=128)
    usual = [FULL if (n + 1) % 6 == 0 or n + 1 == sizes.layers else SLIDING
             for n in range(sizes.layers)]  # fmt: skip
    types = common.read_layer_types(config, sizes.layers, (FULL, SLIDING), usual)
    mixers = {kind: _attention(config, sizes, kind) for kind in sorted(set(types))}
    router = biased.read_router(config, Usual(scale=2.5, groups=(8, 4), chosen=8, shared=0))
    moe = biased.read_moe(config, sizes, router.with_policy(scale_site="routed_output"))
    dense = biased.read_dense(config, sizes)
    sparse = biased.typed_layers(config, sizes.layers, [n >= 3 for n in range(sizes.layers)])
    blocks = biased.blocks(sparse, moe, dense)
    layers = [_layer(sizes, n, mixers[types[n]], block) for n, block in enumerate(blocks)]
    cap = 0.0
    if "final_logit_softcapping" not in config.values or config.has("final_logit_softcapping"):
        cap = config.float("final_logit_softcapping", 1e-3, 1e6, default=30.0)
    return replace(common.decoder(sizes, layers, applies="float32"), logit_softcap=cap)


def _attention(config: Fields, sizes: common.Sizes, kind: str) -> Attention:
    """Without positions, queries grow warmer by (1 + (p + 1) / 2048) ** 0.1."""
    bias = config.bool("attention_bias", False)
    rope = None
    if _is_turned(config, kind):
        rope = ropes.read_rope(
            config,
            sizes.head_dim,
            sizes.context,
            applies="float32",
            source=ropes.rope_of_type(config, kind),
        )
    plain = common.attention(
        sizes,
        rope,
        window=config.int("sliding_window", 1, ropes.FAR, WINDOW) if kind == SLIDING else 0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head",
        norm_applies="float32",
    )
    plain = replace(plain, gate="sigmoid", gate_bias=True)
    if rope is not None:
        return plain
    return replace(
        plain, temperature_kind="power", temperature_scale=WARMTH, temperature_floor=FLOOR
    )


def _is_turned(config: Fields, kind: str) -> bool:
    """Whether layers of a type have positions: where `rope_parameters` has no null for them."""
    every = config.fields("rope_parameters")
    return kind == SLIDING if every is None else every.has(kind)


def _layer(sizes: common.Sizes, number: int, mixer: Attention, block: MoE | MLP) -> Layer:
    norm = Norm(sizes.hidden, sizes.eps, applies="float32")
    branches = []
    for at, (name, operator) in enumerate((("attention", mixer), ("mlp", block))):
        sums = 2 * (number + 1) + at  # what the residual is the sum of, after this branch
        share = sums**-0.5
        branches.append(Branch(name, operator, norm, norm, share, keeps=((sums - 1) / sums) ** 0.5))
    return Layer(tuple(branches))


_NAMES: Names = {
    **PRE_NORM_NAMES,
    "layers.{n}.attention.post_norm": "..post_attention_layernorm",
    "layers.{n}.mlp.pre_norm": "..pre_feedforward_layernorm",
    "layers.{n}.mlp.post_norm": "..post_feedforward_layernorm",
}
FAMILIES = {
    "beam": Family(
        "Beam", beam, _NAMES, "sigmoid, biased choice within groups, renormalised; the sum scaled"
    ),
}
