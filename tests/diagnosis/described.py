"""How the routers of each family in transformers work, and how what they return is replaced.

One row of `DESCRIBE` a family; a test holds every row to what the unpatched module does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.diagnosis.choice import Traits

# (router module, its positional inputs, the block that holds it) -> Traits
Describe = Callable[[Any, tuple[Any, ...], Any], Traits]


def _softmax(norm: bool | None = None, **more: Any) -> Describe:
    def of(m: Any, inputs: Any, block: Any) -> Traits:
        return Traits(m.top_k, norm=m.norm_topk_prob if norm is None else norm, **more)

    return of


def _deepseek(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(
        m.top_k,
        "sigmoid",
        norm=m.norm_topk_prob,
        eps=1e-20,
        scale=m.routed_scaling_factor,
        bias=m.e_score_correction_bias,
        groups=(getattr(m, "num_group", 1) or 1, getattr(m, "topk_group", 1) or 1),
    )


def _beam(m: Any, inputs: Any, block: Any) -> Traits:
    factor = block.routed_scaling_factor
    given = replace(_without_scale(m), norm=m.norm_topk_prob, eps=1e-20)
    return replace(given, scale=factor, scaled_output=True, native_output=factor)


def _without_scale(m: Any) -> Traits:
    groups = (m.num_group, m.topk_group)
    return Traits(m.top_k, "sigmoid", bias=m.e_score_correction_bias, groups=groups)


def _deepseek_v2(m: Any, inputs: Any, block: Any) -> Traits:
    limited = m.topk_method == "group_limited_greedy"
    return Traits(
        m.top_k,
        scale=m.routed_scaling_factor,
        groups=(m.num_group, m.topk_group) if limited else (1, 1),
        group_score="max",
        fill=0.0,
    )


def _mistral4(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(
        m.top_k,
        norm=m.norm_topk_prob,
        eps=1e-20,
        scale=m.routed_scaling_factor,
        groups=(m.num_group, m.topk_group),
        fill=0.0,
        rounded=_coarse(m.weight),
    )


def _coarse(weight: Any) -> torch.dtype | None:
    return None if weight.dtype == torch.float32 else weight.dtype


def _gpt_oss(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(m.top_k, after=True, rounded=_coarse(m.weight))


def _cohere(m: Any, inputs: Any, block: Any) -> Traits:
    sigmoid = m.expert_selection_fn == "sigmoid"
    norm = bool(sigmoid and m.norm_topk_prob)
    rounded = _coarse(m.weight) if sigmoid else None
    return Traits(m.top_k, m.expert_selection_fn, after=True, norm=norm, rounded=rounded)


def _ernie(m: Any, inputs: Any, block: Any) -> Traits:
    bias = m.moe_statics.e_score_correction_bias
    return Traits(m.top_k, norm=True, clamp=m.norm_min, bias=bias)


def _given_bias(eps: float = 0.0, scale: str = "") -> Describe:
    """The bias comes with the call."""

    def of(m: Any, inputs: Any, block: Any) -> Traits:
        factor = getattr(m, scale) if scale else 1.0
        return Traits(m.top_k, "sigmoid", norm=True, eps=eps, bias=inputs[1], scale=factor)

    return of


def _lfm2(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(
        m.top_k,
        "sigmoid",
        norm=m.norm_topk_prob,
        eps=1e-6,
        scale=m.routed_scaling_factor,
        bias=inputs[1] if m.use_expert_bias else None,
        rounded=_coarse(m.weight),
    )


def _scaled_by_block(m: Any, inputs: Any, block: Any) -> Traits:
    """Laguna, MiniMax-M3 and Step 3.5: the block scales what the experts give."""
    factor = block.routed_scaling_factor
    given = Traits(m.top_k, "sigmoid", norm=True, bias=m.e_score_correction_bias)
    return replace(given, scale=factor, scaled_output=True, native_output=factor)


def _kolibri(m: Any, inputs: Any, block: Any) -> Traits:
    bias = m.e_score_correction_bias
    given = Traits(m.top_k, "sigmoid", after=True, norm=m.norm_topk_prob, bias=bias)
    return replace(given, bias_on_logits=True)


def _longcat(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(m.top_k, scale=m.routed_scaling_factor, bias=m.e_score_correction_bias)


def _gemma(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(m.config.top_k_experts, norm=True, per_expert=m.per_expert_scale)


def _phimoe(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(m.top_k, "sparsemixer", jitter=m.router_jitter_noise)


def _dbrx(m: Any, inputs: Any, block: Any) -> Traits:
    norm = m.moe_normalize_expert_weights is not None
    return Traits(m.top_k, norm=norm, rounded=_coarse(m.router.layer.weight))


def _zaya(m: Any, inputs: Any, block: Any) -> Traits:
    given = Traits(m.top_k, bias=m.balancing_biases, skips=m.num_experts)
    return replace(given, rounded=_coarse(m.down_proj.weight))


def _later(m: Any, inputs: Any, block: Any) -> Traits:
    return Traits(m.top_k, after=True)


DESCRIBE: dict[str, Describe] = {
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next"), _softmax()),
    **dict.fromkeys(("mellum", "qwen3_omni_moe_text"), _softmax()),
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_vl_moe_text", "mixtral", "hunyuan_v1_moe"), _softmax(True)
    ),
    "jamba": _softmax(False),
    **dict.fromkeys(
        (
            *("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4_moe_lite"),
            *("glm_moe_dsa", "solar_open", "dots1", "exaone_moe", "nemotron_h"),
            *("mimo_v2_flash", "kimi_linear", "bailing_hybrid", "axk1"),
        ),
        _deepseek,
    ),
    "axk2": lambda m, inputs, block: replace(_deepseek(m, inputs, block), fill=0.0),
    "beam": _beam,
    "deepseek_v2": _deepseek_v2,
    "mistral4": _mistral4,
    "gpt_oss": _gpt_oss,
    "dbrx": _dbrx,
    "cohere2_moe": _cohere,
    **dict.fromkeys(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jetmoe"), _later
    ),
    "ernie4_5_moe": _ernie,
    "minimax_m2": _given_bias(),
    "hy_v3": _given_bias(1e-20, "router_scaling_factor"),
    "afmoe": _given_bias(1e-20, "route_scale"),
    "lfm2_moe": _lfm2,
    "laguna": _scaled_by_block,
    "step3p5": _scaled_by_block,
    "minimax_m3_vl_text": _scaled_by_block,
    "kolibri1": _kolibri,
    "flint": lambda m, inputs, block: Traits(m.top_k, "sigmoid", norm=m.norm_topk_prob),
    "longcat_flash": _longcat,
    "gemma4_text": _gemma,
    "zaya": _zaya,
    "phimoe": _phimoe,
    "llama4_text": lambda m, inputs, block: Traits(m.top_k, "sigmoid", after=True),
}


# The logits of routers that return something else: (module, its input) -> [T, E].
LOGITS: dict[str, Callable[[Any, Any], Any]] = {
    "gemma4_text": lambda m, x: m.proj(m.norm(x) * m.scale * m.scalar_root_size),
}


def replaced(family: str, output: Any, weights: Any, ids: Any) -> Any:
    """What the router returned, with these experts and weights instead."""
    if family == "llama4_text":  # weights of all experts, 0 for those not chosen
        scores, logits = output
        return torch.zeros_like(scores).scatter(1, ids, weights.to(scores.dtype)), logits
    if family == "zaya":  # a token that is skipped is expert 0's, by 0
        ids = ids.masked_fill(ids == output[0].shape[-1] - 1, 0)
    return (output[0], weights.to(output[1].dtype), ids, *output[3:])
