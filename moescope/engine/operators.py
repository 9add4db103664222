"""What a layer is made of, as data: norms, ropes, and the closed table of operators.

Each operator says what a lane keeps for it. `decoder.py` wires them into layers; `parameters.py`
says which tensors each holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moescope.kernels.spec import RouterSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"]


@dataclass(frozen=True, slots=True)
class Norm:
    """Statistics are always float32. `applies` is the dtype the weight is multiplied in: `model`
    rounds the normalised value first, `float32` rounds once at the end."""

    width: int
    eps: float = 1e-6
    kind: Literal["rms", "rms_zero_centred", "layer", "l2"] = "rms"
    weight: bool = True
    bias: bool = False
    applies: Literal["model", "float32"] = "model"
    gate_rank: int = 0  # the result times a sigmoid of a narrow layer over it; 0: not


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies are stretched. `attention_factor` multiplies cos and sin; where longrope has
    an mscale of its own for short or long lanes, that does. `factor` is alpha for `alpha`."""

    kind: Literal["linear", "yarn", "llama3", "longrope", "proportional", "alpha"]
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float = 0.0  # 0: attention_factor
    long_mscale: float = 0.0
    rotated_dims: int = 0  # of proportional: the other dims stand still


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of the first `dims` of each head."""

    theta: float
    dims: int
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None
    applies: Literal["model", "float32"] = "model"  # the dtype cos and sin are multiplied in
    sections: tuple[int, ...] = ()  # of positions with several axes; text has equal ones


@dataclass(frozen=True, slots=True)
class State:
    """What a lane keeps for one operator: `elements` for each token (of the last `window`, if any),
    or `elements` in all."""

    name: str
    growth: Literal["per_token", "fixed"]
    elements: int
    window: int = 0
    dtype: Literal["model", "float32"] = "model"


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with grouped keys and values."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int = 0  # a query sees the last `window` positions, itself included; 0: all
    chunk: int = 0  # a query sees its own chunk of positions only; 0: all
    v_head_dim: int = 0  # 0: head_dim
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    kv_norm: Norm | None = None  # of keys, where its width differs from that of `qk_norm`
    qk_norm_over: Literal["flat", "per_head"] = "per_head"
    qk_norm_after_rope: bool = False
    v_norm: Norm | None = None
    clip_qkv: float | None = None
    sinks: bool = False
    float32_scores: bool = False  # with sinks: products of queries and keys are not rounded
    softcap: float = 0.0
    gate: Literal[
        "none", "in_q_proj", "sigmoid", "softplus", "sigmoid_per_head", "softplus_per_head"
    ] = "none"
    keys_are_values: bool = False
    value_scale: float = 1.0
    temperature_scale: float = 0.0  # of queries, by log1p(floor((p + 1) / temperature_floor))
    temperature_floor: int = 0
    temperature_kind: Literal["log", "power"] = "log"  # power: (1 + (p + 1) / floor) ** scale
    gate_bias: bool = False  # one number for each head, of a gate of its own
    shares_kv_of: int | None = None  # an earlier layer whose keys and values are read

    def state(self) -> tuple[State, ...]:
        if self.shares_kv_of is not None:
            return ()
        width = self.kv_heads * (self.head_dim + (self.v_head_dim or self.head_dim))
        return (State("kv", "per_token", width, self.window or self.chunk),)


@dataclass(frozen=True, slots=True)
class ConvolvedAttention:
    """Softmax attention whose queries and keys pass two causal convolutions over the last tokens,
    each channel's own and then one over the channels of a head, beside their means (compressed
    convolutional attention, arXiv 2510.04476).

    Half of the columns of a value are of the token before. Queries and keys are brought to length
    sqrt(head_dim), keys then multiplied by a learned number for each head.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    channel_kernel: int
    head_kernel: int
    window: int = 0
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def tail(self) -> int:
        """How many tokens before the present one are looked at again."""
        return max(1, self.channel_kernel + self.head_kernel - 2)

    def state(self) -> tuple[State, ...]:
        values = self.kv_heads * self.head_dim
        channels = self.heads * self.head_dim + values + values // 2
        return (
            State("kv", "per_token", 2 * values, self.window),
            State("convolution", "fixed", channels * self.tail),
        )


@dataclass(frozen=True, slots=True)
class Indexer:
    """Which tokens a query of latent attention sees: the `topk` with the highest scores, by a small
    attention with one key for all heads (DeepSeek sparse attention). All, where there are fewer."""

    heads: int
    head_dim: int
    topk: int
    rope: Rope | None  # of the first dims
    norm: Norm  # of the keys


@dataclass(frozen=True, slots=True)
class MLA:
    """Multi-head latent attention: keys and values expand from one latent row per token."""

    hidden: int
    heads: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    rope: Rope | None
    q_lora_rank: int = 0  # 0: queries are projected directly
    latent_norm: Norm | None = None
    q_latent_norm: Norm | None = None
    q_latent_scale: float = 1.0
    kv_latent_scale: float = 1.0
    bias: bool = False  # of the projections from and to the hidden state; not of q_proj
    q_reads_raw: bool = False  # queries are projected from the latent, normed and as it was
    gate: Literal["none", "in_q_proj", "sigmoid_per_head"] = "none"  # a sigmoid on the values, of
    # rows beside each query or of a product of its own
    temperature_scale: float = 0.0  # of queries, by log1p(floor(p / temperature_floor))
    temperature_floor: int = 0
    indexer: Indexer | None = None
    shares_choice: bool = False  # sees what the last indexer before it chose

    def state(self) -> tuple[State, ...]:
        latent = State("latent", "per_token", self.kv_lora_rank + self.rope_dim)
        if self.indexer is None:
            return (latent,)
        return (latent, State("index", "per_token", self.indexer.head_dim))


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Recurrent attention with a matrix state per value head and short convolutions before it."""

    hidden: int
    kind: Literal["gated_delta", "kda", "lightning"]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    out_norm: Norm
    out_gate: Literal["silu", "sigmoid"] = "silu"
    gate_rank: int = 0  # kda: width of the narrow layer before its gates; 0: none
    decay_floor: float = 0.0  # kda: the log decay is this times a sigmoid; 0: of softplus

    def state(self) -> tuple[State, ...]:
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        matrix = self.value_heads * self.key_dim * self.value_dim
        return (
            State("convolution", "fixed", channels * (self.conv_kernel - 1)),
            State("recurrent", "fixed", matrix, dtype="float32"),
        )


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Mamba: a selective state space after a short convolution."""

    hidden: int
    kind: Literal["mamba1", "mamba2"]
    inner: int
    state_size: int
    conv_kernel: int
    heads: int = 0  # mamba2
    head_dim: int = 0
    groups: int = 1
    dt_rank: int = 0  # mamba1
    conv_bias: bool = True
    bias: bool = False
    inner_norms: Norm | None = None  # of dt, B and C
    gated_norm: Norm | None = None
    dt_floor: float = 0.0
    dt_ceiling: float = float("inf")

    def select_norms(self) -> tuple[tuple[str, Norm | None], ...]:
        """mamba1: the norms of dt, B and C by the names of their tensors."""
        norm = self.inner_norms
        widths = {"dt_norm": self.dt_rank, "b_norm": self.state_size, "c_norm": self.state_size}
        return tuple((name, norm and replace(norm, width=width)) for name, width in widths.items())

    def state(self) -> tuple[State, ...]:
        extra = 2 * self.groups * self.state_size if self.kind == "mamba2" else 0
        return (
            State("convolution", "fixed", (self.inner + extra) * (self.conv_kernel - 1)),
            State("recurrent", "fixed", self.inner * self.state_size, dtype="float32"),
        )


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A gated short convolution."""

    hidden: int
    kernel: int
    bias: bool = False

    def state(self) -> tuple[State, ...]:
        return (State("convolution", "fixed", self.hidden * (self.kernel - 1)),)


@dataclass(frozen=True, slots=True)
class MLP:
    """A dense feed-forward block, also what a shared expert is."""

    hidden: int
    width: int
    activation: Activation = "silu"
    glu: bool = True
    bias: bool = False
    limit: float = 0.0  # clamps gate and up; 0: none
    limit_site: Literal["before", "after"] = "before"  # the activation of the gate
    alpha: float = 1.0  # of swiglu_oai: gate * sigmoid(alpha * gate)
    up_shift: float = 0.0  # added to up before the product

    def state(self) -> tuple[State, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer, all alike."""

    width: int
    activation: Activation = "silu"
    glu: bool = True
    bias: bool = False
    limit: float = 0.0
    limit_site: Literal["before", "after"] = "before"
    alpha: float = 1.0
    up_shift: float = 0.0
    hidden: int = 0  # their input and output width, where it is not the decoder's


@dataclass(frozen=True, slots=True)
class GateNetwork:
    """What stands between a router's input and its gate: a narrow projection, a norm, and layers
    with a bias. `writes` is the tap that the projected input is left in; a router that `reads` a
    tap adds what is in it, each column times a learned number, before it leaves its own."""

    width: int
    norm: Norm
    layers: int
    activation: Activation
    reads: str = ""
    writes: str = ""


@dataclass(frozen=True, slots=True)
class MoE:
    """A router and what it routes to."""

    hidden: int
    router: RouterSpec
    experts: Experts
    shared: MLP | None = None
    output_bias: bool = False  # learned, added after the sum
    router_norm: Norm | None = None  # of a router that reads the residual through its own norm
    sums_in_float32: bool = False  # routed and shared output, added before they are rounded
    gate_network: GateNetwork | None = None  # with `router_input` carried_mlp

    def state(self) -> tuple[State, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class RoutedAttention:
    """Attention whose query and output projections are experts; keys and values are shared."""

    hidden: int
    router: RouterSpec
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    output_bias: bool = False

    def state(self) -> tuple[State, ...]:
        return (State("kv", "per_token", 2 * self.kv_heads * self.head_dim),)


@dataclass(frozen=True, slots=True)
class Pass:
    """The identity: carries a tap on, through the norms and the multiplier of its branch."""

    def state(self) -> tuple[State, ...]:
        return ()


Operator = (
    Attention
    | ConvolvedAttention
    | MLA
    | LinearAttention
    | StateSpace
    | ShortConv
    | MLP
    | MoE
    | RoutedAttention
    | Pass
)


def rotary_embeddings(operator: Operator) -> Iterator[Rope]:
    """Those of an operator and of what is in it."""
    for holder in (operator, getattr(operator, "indexer", None)):
        if (rope := getattr(holder, "rope", None)) is not None:
            yield rope
