"""Kimi Linear and Ling 3 (bailing_hybrid): delta rule with a decay for every channel (KDA), and
latent attention now and then.

Sources: arXiv 2510.26692; transformers `modeling_kimi_linear.py` and `modeling_bailing_hybrid.py`.
"""

from __future__ import annotations

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import biased, common, latent
from moescope.engine.families.family import Family
from moescope.engine.families.forms import In
from moescope.engine.families.names import PRE_NORM_NAMES, Names, Stack
from moescope.engine.operators import LinearAttention, Norm, Operator

LINEAR, FULL = "linear_attention", "full_attention"
# What published configs call the fields that others share.
ALIASES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
EPS = 1e-6  # of the norms on latents
_LIGHTNING = "lightning attention is not implemented"


def _keys(a: LinearAttention) -> int:
    return a.key_heads * a.key_dim


def _values(a: LinearAttention) -> int:
    return a.value_heads * a.value_dim


def _convs(place: str) -> Stack:
    return Stack(
        tuple(
            (In(place.format(name), "squeezed", "conv last"), rows)
            for name, rows in (("q", _keys), ("k", _keys), ("v", _values))
        )
    )


NAMES: Names = {
    **PRE_NORM_NAMES,
    "embed": ("model.embed_tokens", "model.word_embeddings"),
    "layers.{n}.attention": (".self_attn", ".attention"),
    "layers.{n}.attention.gate_proj": ".g_proj",
    "layers.{n}.delta": (".self_attn", ".attention"),
    "layers.{n}.delta.pre_norm": "..input_layernorm",
    "layers.{n}.delta.conv.weight": (
        In("..conv1d.weight", "squeezed", "conv last"),
        _convs("..{}_conv1d.weight"),
        _convs("..{}_conv.conv.weight"),  # as mlx-lm has it
    ),
    "layers.{n}.delta.forget_a": (".f_a_proj", ".forget_gate.f_a_proj"),
    "layers.{n}.delta.forget_b": (
        *(".f_b_proj", ".forget_gate.f_b_proj"),
        *(".f_proj", ".forget_gate.f_proj"),
    ),
    "layers.{n}.delta.A_log": tuple(
        In(place, "as stored", "inside ones") for place in (".A_log", ".forget_gate.A_log")
    ),
    "layers.{n}.delta.dt_bias": (".dt_bias", ".forget_gate.dt_bias"),
    "layers.{n}.delta.strength": ".b_proj",
    "layers.{n}.delta.gate_a": ".g_a_proj",
    "layers.{n}.delta.gate_b": (".g_b_proj", ".g_proj"),
    "layers.{n}.delta.norm": ".o_norm",
    "layers.{n}.delta.out_proj": (".o_proj", ".dense"),
    "layers.{n}.mlp": (".mlp", ".block_sparse_moe"),
    "unread": ("model.mtp.*",),
}


def kimi_linear(config: Fields) -> DecoderSpec:
    """Latent attention without positions: the delta rule knows where a token stands."""
    config = config.renamed(ALIASES)
    inner = config.fields("linear_attn_config") or Fields({})
    ranks = latent.read_ranks(config, latent.Ranks(q=0))
    sizes = latent.read_sizes(config, ranks, eps=1e-5, context=1048576)
    heads = _either(config, inner, "linear_num_heads", "num_heads", 32)
    head_dim = _either(config, inner, "linear_head_dim", "head_dim", 128)
    kernel = _either(config, inner, "linear_conv_kernel_dim", "short_conv_kernel_size", 4)
    delta = _delta(sizes, heads, head_dim, kernel, gate_rank=head_dim)
    usual = [FULL if n and n % 4 == 0 else LINEAR for n in range(sizes.layers)]
    types = _layer_types(config, sizes.layers, _listed(config, inner, sizes.layers) or usual)
    usual_router = biased.Usual(scale=2.446, chosen=8)
    attention = latent.attention(config, sizes, ranks, None)
    return _decoder(config, sizes, {FULL: attention, LINEAR: delta}, types, usual_router, 1)


def bailing_hybrid(config: Fields) -> DecoderSpec:
    """A gate for each head of the attention, and a decay that is bounded from below."""
    _refuse_lightning(config)
    config = config.renamed(ALIASES)
    ranks = latent.read_ranks(config, latent.Ranks(q=0))
    sizes = latent.read_sizes(config, ranks, eps=1e-6, context=262144)
    rope = latent.read_rope(config, sizes, ranks, usual_theta=6e6, interleaved=True)
    head_dim = config.int("linear_head_dim", 1, common.COUNT, None)
    if head_dim is None:
        head_dim = config.int("head_dim", 1, common.COUNT, 128)
    kernel = config.int(("linear_conv_kernel_dim", "short_conv_kernel_size"), 2, 64, 4)
    safe = config.bool("kda_safe_gate", True)
    floor = config.float("kda_lower_bound", -1e3, -1e-3, -5.0) if safe else 0.0
    delta = _delta(sizes, sizes.heads, head_dim, kernel, decay_floor=floor)
    every = config.int("layer_group_size", 1, 1024, 6)
    usual = [FULL if (n + 1) % every == 0 else LINEAR for n in range(sizes.layers)]
    types = _layer_types(config, sizes.layers, usual)
    usual_router = biased.Usual(scale=2.5, groups=(8, 4), chosen=8)
    attention = latent.attention(config, sizes, ranks, rope, gate="sigmoid_per_head")
    return _decoder(config, sizes, {FULL: attention, LINEAR: delta}, types, usual_router, 2)


def _refuse_lightning(config: Fields) -> None:
    """Ling 2.5 and 2.6 have this model type, too, and another linear attention."""
    for name in config.list("architectures", str, default=[]):
        if name.startswith("BailingMoeV2"):
            raise config.error("architectures", f"BailingMoeV3ForCausalLM: {_LIGHTNING}")
    if config.has("group_norm_size") and not any(name.startswith("kda_") for name in config.values):
        raise config.error("group_norm_size", f"nothing: {_LIGHTNING}")


def _decoder(
    config: Fields,
    sizes: common.Sizes,
    mixers: dict[str, Operator],
    types: list[str],
    usual: biased.Usual,
    dense: int,
) -> DecoderSpec:
    names = {FULL: "attention", LINEAR: "delta"}
    norm = Norm(sizes.hidden, sizes.eps)
    moe = biased.read_moe(config, sizes, biased.read_router(config, usual))
    sparse = biased.typed_layers(config, sizes.layers, dense)
    feeds = biased.blocks(sparse, moe, biased.read_dense(config, sizes))
    layers = [
        Layer((Branch(names[kind], mixers[kind], norm), Branch("mlp", feed, norm)))
        for kind, feed in zip(types, feeds, strict=True)
    ]
    return common.decoder(sizes, layers)


def _delta(
    sizes: common.Sizes,
    heads: int,
    head_dim: int,
    kernel: int,
    *,
    gate_rank: int = 0,
    decay_floor: float = 0.0,
) -> LinearAttention:
    return LinearAttention(
        sizes.hidden,
        "kda",
        heads,
        heads,
        head_dim,
        head_dim,
        kernel,
        Norm(head_dim, sizes.eps, applies="float32"),
        out_gate="sigmoid",
        gate_rank=gate_rank,
        decay_floor=decay_floor,
    )


def _either(config: Fields, inner: Fields, name: str, inner_name: str, usual: int) -> int:
    """A size of the published config's inner object, or else of the config itself."""
    found = inner.int(inner_name, 1, common.COUNT, None)
    return config.int(name, 1, common.COUNT, usual) if found is None else found


def _listed(config: Fields, inner: Fields, layers: int) -> list[str] | None:
    """Types of layers from the lists of a published config, which count from 1."""
    full = inner.list("full_attn_layers", int, default=None)
    linear = inner.list("kda_layers", int, default=None)
    if full is None or linear is None or config.has("layer_types"):
        return None
    if sorted([*full, *linear]) != list(range(1, layers + 1)):
        raise inner.error("kda_layers", f"with full_attn_layers, each of 1..{layers} once")
    return [FULL if number in set(full) else LINEAR for number in range(1, layers + 1)]


def _layer_types(config: Fields, layers: int, usual: list[str]) -> list[str]:
    types = config.list("layer_types", str, layers, default=usual)
    if unknown := set(types) - {LINEAR, FULL}:
        raise config.error("layer_types", f"{LINEAR} or {FULL}, not {sorted(unknown)[0]}")
    return list(types)


_RELEASED = "renormalised sigmoid, biased choice"
FAMILIES = {
    "kimi_linear": Family(
        "Kimi Linear",
        kimi_linear,
        NAMES,
        _RELEASED,
        notes=("mlx-lm takes this router's sigmoid and bias in bfloat16; here both are float32",),
    ),
    "bailing_hybrid": Family("Ling 3", bailing_hybrid, NAMES, _RELEASED),
}
