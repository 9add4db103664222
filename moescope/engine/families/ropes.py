"""Rotary embeddings from a config, in both dialects: `rope_parameters`, or `rope_theta` and
`rope_scaling`; one for all layers, or one for every type of layer.

Values that would change the numbers and are not implemented are refused by key and value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from moescope.engine.config import Fields
from moescope.engine.operators import Rope, RopeScaling

Applies = Literal["model", "float32"]
Style = Literal["half", "interleaved"]
KINDS = ("default", "linear", "yarn", "llama3")
FAR = 1 << 30  # positions


def read_rope(
    config: Fields,
    head_dim: int,
    context: int,
    *,
    usual_theta: float = 10000.0,
    partial: float = 1.0,
    kinds: Sequence[str] = KINDS,
    applies: Applies = "model",
    style: Style = "half",
    source: Fields | None = None,
) -> Rope:
    """The rotary embedding of heads `head_dim` wide.

    `usual_theta` and `partial` are what the family's own code takes where the config is silent,
    `kinds` the rope types it knows. Where the config gives no base and the family's default is not
    the usual 10000, it is refused: a program that filled in 10000 would be fluent and wrong.
    `source` is the object to read instead of the config's own (see `rope_of_type`).
    """
    source = _flat_object(config) if source is None else source
    theta = _either(source, config, "rope_theta", 1.0, 1e15)
    if theta is None:
        if usual_theta != 10000.0:
            raise config.error("rope_theta", f"a number (this family's usual is {usual_theta:g})")
        theta = usual_theta
    share = _either(source, config, "partial_rotary_factor", 0.0, 1.0)
    share = partial if share is None else share
    scaling = (
        None if source is None else _scaling(source, config, head_dim, context, theta, kinds, share)
    )
    whole = scaling is not None and scaling.kind == "proportional"
    dims = head_dim if whole else int(head_dim * share)
    if dims % 2 or dims < 2:
        raise config.error("partial_rotary_factor", f"an even part of head_dim {head_dim}")
    return Rope(theta, dims, style=style, scaling=scaling, applies=applies)


def rope_of_type(config: Fields, layer_type: str) -> Fields | None:
    """The object of one type of layer in `rope_parameters`, where the config has one for each."""
    every = config.fields("rope_parameters")
    return None if every is None else every.fields(layer_type)


def _flat_object(config: Fields) -> Fields | None:
    """`rope_parameters` or, in the older dialect, `rope_scaling`: flat, and not two that differ."""
    given = [name for name in ("rope_parameters", "rope_scaling") if config.raw(name)]
    source = config.fields(tuple(given)) if given else None
    for name in source.values if source else ():
        if source is not None and isinstance(source.values[name], dict):
            raise source.error(name, "no object: this model type has one rope for all layers")
    return source


def _either(source: Fields | None, config: Fields, name: str, lo: float, hi: float) -> float | None:
    """A number of the rope's object, or else of the config."""
    found = None if source is None else source.float(name, lo, hi, default=None)
    return config.float(name, lo, hi, default=None) if found is None else found


def _scaling(
    source: Fields,
    config: Fields,
    head_dim: int,
    context: int,
    theta: float,
    kinds: Sequence[str],
    share: float,
) -> RopeScaling | None:
    kind = source.str(("rope_type", "type"), tuple(kinds), default="default")
    if kind == "default":
        return None
    if kind == "proportional":
        turned = 2 * int(share * head_dim // 2)
        return RopeScaling(
            "proportional", source.float("factor", 1e-3, 1e6, 1.0), rotated_dims=turned
        )
    if kind != "linear" and theta <= 1.0:
        holder = source if source.has("rope_theta") else config
        raise holder.error("rope_theta", f"more than 1 where frequencies are stretched by {kind}")
    original = config.int("original_max_position_embeddings", 1, FAR, None)
    if original is None:
        original = source.int("original_max_position_embeddings", 1, FAR, context)
    return _READERS[kind](source, context, original, int(head_dim * share))


def _linear(source: Fields, context: int, original: int, dims: int) -> RopeScaling:
    return RopeScaling("linear", source.float("factor", 1e-3, 1e6))


def _yarn(source: Fields, context: int, original: int, dims: int) -> RopeScaling:
    factor = source.float("factor", 1e-3, 1e6, default=None) or context / original
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=_yarn_attention_factor(source, factor),
        beta_fast=source.float("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
        beta_slow=source.float("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
        truncate=source.bool("truncate", True),
    )


def yarn_mscale(factor: float, scale: float) -> float:
    """What yarn multiplies cos and sin by, or, squared, a softmax scale (arXiv 2309.00071,
    equation 22, with DeepSeek's mscale)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_attention_factor(source: Fields, factor: float) -> float:
    given = source.float("attention_factor", 0.0, 1e6, default=None)
    if given is not None:
        return given
    mscale = source.float("mscale", 0.0, 1e6, default=0.0)
    every = source.float("mscale_all_dim", 0.0, 1e6, default=0.0)
    if mscale and every:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, every)
    return yarn_mscale(factor, 1.0)


def _llama3(source: Fields, context: int, original: int, dims: int) -> RopeScaling:
    low = source.float("low_freq_factor", 1e-3, 1e6)
    high = source.float("high_freq_factor", 1e-3, 1e6)
    if high < low:
        raise source.error("high_freq_factor", f"at least low_freq_factor {low:g}")
    return RopeScaling(
        "llama3",
        source.float("factor", 1e-3, 1e6),
        original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _longrope(source: Fields, context: int, original: int, dims: int) -> RopeScaling:
    short, long = (
        tuple(float(x) for x in source.list(name, float, dims // 2))
        for name in ("short_factor", "long_factor")
    )
    factor = source.float("factor", 1e-3, 1e6, default=None) or context / original
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=source.float("attention_factor", 0.0, 1e6, default=usual),
        short_factor=short,
        long_factor=long,
        short_mscale=source.float("short_mscale", 0.0, 1e6, default=0.0),
        long_mscale=source.float("long_mscale", 0.0, 1e6, default=0.0),
    )


def _dynamic(source: Fields, context: int, original: int, dims: int) -> RopeScaling:
    """With an `alpha`, "dynamic" is a fixed stretch of the base (Hunyuan)."""
    if not source.has("alpha"):
        raise source.error(("rope_type", "type"), "dynamic with an alpha, or another type")
    return RopeScaling("alpha", source.float("alpha", 1e-3, 1e9))


_READERS: dict[str, Callable[[Fields, int, int, int], RopeScaling]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "dynamic": _dynamic,
}
