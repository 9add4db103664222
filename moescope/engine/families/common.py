"""What the families share: the parts of a config that mean the same everywhere, read once.

Both dialects of a field are read here (`rope_theta` and `rope_parameters`, `num_experts` and
`num_local_experts`); values that would change the numbers and are not implemented are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.engine.config import Fields
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.families import ropes
from moescope.engine.families.ropes import Applies
from moescope.engine.operators import MLP, Activation, Attention, Experts, MoE, Norm, Operator, Rope
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

SIZE, COUNT = 1 << 20, 4096
FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The fields every config of this kind has."""

    vocab: int
    hidden: int
    width: int  # intermediate_size
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    tied: bool


def read_sizes(
    config: Fields,
    *,
    eps: float,
    context: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    width: int | None = None,
    layers: int | None = None,
    eps_key: str = "rms_norm_eps",
    tied: bool = False,
) -> Sizes:
    """The keywords are what the family's own code takes where the config is silent; `kv_heads`
    None: as many as there are heads; `head_dim` None: the heads' share of the hidden width; `width`
    None: intermediate_size must be there. `layers`: how many there are, where another field says
    so; `eps_key`: what this config calls the norms' eps."""
    heads = config.int("num_attention_heads", 1, COUNT)
    if kv_heads is None or "num_key_value_heads" in config.values:
        kv_heads = config.int("num_key_value_heads", 1, COUNT, heads)
    hidden = config.int("hidden_size", 1, SIZE)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if not config.has("head_dim") and head_dim is None and hidden % heads:
        raise config.error("num_attention_heads", f"a divisor of hidden_size {hidden}")
    head_dim = config.int("head_dim", 2, SIZE, head_dim or hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", "an even number")
    return Sizes(
        vocab=config.int("vocab_size", 1, 1 << 24),
        hidden=hidden,
        width=config.int("intermediate_size", 1, SIZE)
        if width is None
        else config.int("intermediate_size", 0, SIZE, width),
        layers=layers or config.int("num_hidden_layers", 1, 1024),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=config.int("max_position_embeddings", 1, 1 << 30, context),
        eps=config.float(eps_key, 0.0, 1.0, default=eps),
        tied=config.bool("tie_word_embeddings", tied),
    )


def read_rope(
    config: Fields, sizes: Sizes, *, usual_theta: float = 10000.0, applies: Applies = "model"
) -> Rope:
    """The rotary embedding of whole heads, one for all layers; see `ropes.read_rope`."""
    rope = ropes.read_rope(
        config, sizes.head_dim, sizes.context, usual_theta=usual_theta, applies=applies
    )
    if rope.dims != sizes.head_dim:
        holder = config if config.has("partial_rotary_factor") else config.fields("rope_parameters")
        raise (holder or config).error("partial_rotary_factor", "1 for this model type")
    return rope


def attention(
    sizes: Sizes,
    rope: Rope | None,
    *,
    window: int = 0,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: Literal["none", "flat", "per_head"] = "none",
    norm_applies: Applies = "model",
    clip_qkv: float | None = None,
) -> Attention:
    """Grouped attention with the usual scale; `flat` norms run over all heads at once."""
    heads = {"none": (0, 0), "flat": (sizes.heads, sizes.kv_heads), "per_head": (1, 1)}[qk_norm]
    q_norm, k_norm = (
        Norm(count * sizes.head_dim, sizes.eps, applies=norm_applies) if count else None
        for count in heads
    )
    return Attention(
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        rope=rope,
        window=window,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=q_norm,
        kv_norm=k_norm if k_norm != q_norm else None,
        qk_norm_over="flat" if qk_norm == "flat" else "per_head",
        clip_qkv=clip_qkv,
    )


def softmax_router(
    config: Fields,
    *,
    renormalises: bool | None = None,
    usual_norm: bool = False,
    combine: Applies = "model",
    shared: int = 0,
    chosen_key: str = "num_experts_per_tok",
) -> RouterSpec:
    """Softmax over all experts, then top-k. `renormalises` None: by `norm_topk_prob`, `usual_norm`
    where the config is silent.

    The gate's product, so its logits too, are in the model's dtype, the softmax in float32
    (transformers: OlmoeTopKRouter and its copies; MixtralTopKRouter leaves the weights float32).
    """
    experts, chosen = read_counts(config, chosen_key)
    if renormalises is None:
        renormalises = config.bool("norm_topk_prob", usual_norm)
    return RouterSpec(
        RouterPolicy(chosen, norm_topk_prob=renormalises),
        RouterWiring(
            experts,
            combine_dtype=combine,
            shared_experts=shared,
            shared_expert_gate="sigmoid" if shared else "none",
        ),
    )


def read_counts(config: Fields, chosen_key: str = "num_experts_per_tok") -> tuple[int, int]:
    """Experts, and how many of them a token takes."""
    experts = config.int(("num_experts", "num_local_experts"), 1, COUNT)
    chosen = config.int(chosen_key, 1, 64)
    if chosen > experts:
        raise config.error(chosen_key, f"at most num_experts {experts}")
    return experts, chosen


def read_layer_types(
    config: Fields,
    layers: int,
    kinds: Sequence[str],
    usual: Sequence[str],
    key: str = "layer_types",
) -> list[str]:
    """One word of `kinds` for every layer; `usual` where the config is silent."""
    types = config.list(key, str, layers, default=None)
    if types is None:
        return list(usual)
    if unknown := set(types) - set(kinds):
        raise config.error(key, f"{' or '.join(kinds)}, not {sorted(unknown)[0]}")
    return list(types)


def read_activation(config: Fields, key: str = "hidden_act", usual: str = "silu") -> Activation:
    return ACTIVATIONS[config.str(key, tuple(ACTIVATIONS), default=usual)]


def pre_norm_layer(
    sizes: Sizes, mixer: Operator, feed_forward: MoE | MLP, *, norm: Norm | None = None
) -> Layer:
    """x + attention(norm(x)), then x + feed_forward(norm(x)); `norm` None: an RMS norm."""
    norm = norm or Norm(sizes.hidden, sizes.eps)
    blocks: tuple[tuple[str, Operator], ...] = (("attention", mixer), ("mlp", feed_forward))
    return Layer(tuple(Branch(name, op, pre_norm=norm) for name, op in blocks))


def decoder(
    sizes: Sizes,
    layers: list[Layer],
    *,
    applies: Applies = "model",
    final_norm: Norm | None = None,
    carried: tuple[str, ...] = (),
) -> DecoderSpec:
    """`final_norm` None: an RMS norm, multiplied in the dtype `applies` says. `carried`: taps that
    live on from layer to layer."""
    return DecoderSpec(
        vocab_size=sizes.vocab,
        hidden=sizes.hidden,
        context=sizes.context,
        layers=tuple(layers),
        final_norm=final_norm or Norm(sizes.hidden, sizes.eps, applies=applies),
        tied_head=sizes.tied,
        carried=carried,
    )


def experts(config: Fields, width: int) -> Experts:
    return Experts(width, read_activation(config))
