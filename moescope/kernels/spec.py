"""`RouterSpec`: a router as a value, and `Routing`: what it decided.

A spec has two parts. `RouterPolicy` is what a row of numbers can say: a kernel reads it at run time,
so changing it recompiles nothing. `RouterWiring` is what changes the flow of data around the router.
Nothing here computes; `reference.py` is the definition of what the fields mean.

Letters used for shapes in this package: T tokens, E expert classes (null experts included), K picked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["model", "float32", "bfloat16", "float16"]

@dataclass(frozen=True, slots=True)
class RouterPolicy:
    """How one row of router logits becomes K experts and K combine weights.

    The order of operations is the order of the fields. `model` as a dtype means the dtype the
    decoder runs in; `RouterSpec.resolved` replaces it.
    """

    num_experts_per_tok: int
    # logits
    gate_quant_bits: int = 0  # 0: the gate as stored; else symmetric per-row rounding to n bits
    router_logit_scale: float = 1.0
    router_logit_softcapping: float = 0.0  # 0: none; else cap * tanh(logits / cap)
    logits_dtype: Dtype = "float32"
    # scores
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"] = "softmax"
    score_order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    score_passes: Literal[1, 2] = 1
    score_dtype: Dtype = "float32"
    router_jitter_noise: float = 0.0  # sparsemixer's threshold is twice this
    # selection
    correction_bias: Literal["none", "score", "logit"] = "none"
    correction_bias_dtype: Dtype = "float32"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    group_mask_fill: Literal["-inf", "0"] = "-inf"
    tie_break: Literal["lower_id", "higher_id"] = "lower_id"
    # weights
    weights_from: Literal["scores", "biased_scores", "biased_minus_bias", "logits"] = "scores"
    norm_topk_prob: bool = False
    norm_p: float = 1.0
    norm_eps: float = 0.0
    norm_eps_mode: Literal["add", "clamp", "uniform"] = "add"
    per_expert_scale: bool = False
    routed_scaling_factor: float = 1.0
    scale_power: Literal[0, 1, 2] = 1  # how often the factor is applied; 1 is right
    scale_site: Literal["weights", "routed_output"] = "weights"


@dataclass(frozen=True, slots=True)
class RouterWiring:
    """What the router is connected to: inputs, null and shared experts, dtypes of gate and combine."""

    num_experts: int  # routed experts, null experts not counted
    num_null_experts: int = 0
    null_expert_kind: Literal["none", "identity", "skip"] = "none"
    router_input: Literal["normed", "residual", "residual_rms_scaled", "carried_mlp"] = "normed"
    router_dtype: Dtype = "model"  # of the gate's matrix product
    gate_bias: bool = False  # a learned linear bias, part of the logit
    hash_table: bool = False  # ids come from a table indexed by token id
    shared_experts: int = 0
    shared_expert_gate: Literal["none", "sigmoid"] = "none"
    shared_combination: Literal["add", "average", "in_router_softmax", "mix_softmax"] = "add"
    apply_router_weight_on_input: bool = False
    combine_dtype: Dtype = "model"
    moe_latent_size: int = 0
    expert_pre_norm: bool = False
    expert_post_norm: bool = False


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """One router: `policy` (a toggle away) and `wiring` (part of the decoder)."""

    policy: RouterPolicy
    wiring: RouterWiring


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a router decided for T tokens. Arrays are numpy, or torch where torch tensors came in.

    Unused slots (a policy with fewer than K experts) hold id -1, score 0 and weight 0. An invalid row
    (NaN, +inf, or fewer than K finite logits) holds ids -1, weights 0, and NaN elsewhere.
    """

    expert_ids: Any  # [T, K] int32, selection value descending, then id ascending
    scores: Any  # [T, K] float32, unbiased scores of the selected
    weights: Any  # [T, K] float32, the combine weights: factors really multiplied with each expert
    score_sum: Any  # [T] float32, sum of the weights
    mass: Any  # [T] float32, sum of the scores, before normalisation and scaling
    entropy: Any  # [T] float32, nats, of the scores normalised over all E
    margin: Any  # [T] float32, selection value at rank K minus rank K+1; NaN where there is none
    runner_up: Any  # [T] int32, the expert at rank K+1; -1 where there is none
    logits: Any = field(default=None)  # [T, E] float32, the router logits as they were scored
