"""The reference router against the router modules of transformers: one spec each, nothing else.

The gate's weight is the identity, so that a hidden state is a row of logits. Modules run in
float32 and in bfloat16, where the rounding points of the spec have to be the right ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, route

E, K, T = 16, 4, 200
MODEL = {"logits_dtype": "model"}  # the gate's product is in the model's dtype
SIGMOID = {"scoring_func": "sigmoid", "correction_bias": "score", "norm_topk_prob": True}
AFTER = {"score_order": "topk_then_score"}
BIAS = ("e_score_correction_bias", "moe_statics.e_score_correction_bias")


def call(router: Any, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids) of a module that takes hidden states and gives logits, weights, ids."""
    return router(x)[1:3]


def with_bias(router: Any, x: torch.Tensor, bias: torch.Tensor) -> tuple[Any, Any]:
    return router(x, bias)[1:3]


def dense(router: Any, x: torch.Tensor, bias: torch.Tensor) -> tuple[Any, Any]:
    """llama4: weights of all experts, zero where not selected."""
    return torch.topk(router(x)[0], router.top_k, dim=-1)


def dbrx(router: Any, x: torch.Tensor, bias: torch.Tensor) -> tuple[Any, Any]:
    ffn = import_module("transformers.models.dbrx.modeling_dbrx").DbrxFFN
    return ffn.route_tokens_to_experts(router, router(x))


@dataclass(frozen=True)
class Peer:
    """One router module, its configuration, and the same router as a spec."""

    family: str
    module: str
    policy: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    wiring: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., tuple[Any, Any]] = call
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


GROUPS = {"n_group": 4, "topk_group": 2}
F32_COMBINE = {"combine_dtype": "float32"}
PEERS = [
    Peer("olmoe", "OlmoeTopKRouter", MODEL, {"norm_topk_prob": False}),
    Peer(
        "olmoe",
        "OlmoeTopKRouter",
        {**MODEL, "norm_topk_prob": True},
        {"norm_topk_prob": True},
    ),
    Peer("mixtral", "MixtralTopKRouter", {**MODEL, "norm_topk_prob": True}, wiring=F32_COMBINE),
    Peer("gpt_oss", "GptOssTopKRouter", {**MODEL, **AFTER, "score_dtype": "model"}),
    Peer("granitemoe", "GraniteMoeTopKRouter", {**MODEL, **AFTER}),
    Peer(
        "cohere2_moe",
        "Cohere2MoeTopKRouter",
        {
            **MODEL,
            **AFTER,
            "scoring_func": "sigmoid",
            "score_dtype": "model",
            "norm_topk_prob": True,
        },
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
    ),
    Peer(
        "llama4",
        "Llama4Router",
        {**MODEL, **AFTER, "scoring_func": "sigmoid"},
        call=dense,
    ),
    Peer(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {**GROUPS, "group_score": "max", "group_mask_fill": "0", "routed_scaling_factor": 16.0},
        {**GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        F32_COMBINE,
    ),
    Peer(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {**SIGMOID, **GROUPS, "norm_eps": 1e-20, "routed_scaling_factor": 2.5},
        {**GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        F32_COMBINE,
    ),
    Peer(
        "mistral4",
        "Mistral4TopkRouter",
        {
            **MODEL,
            **GROUPS,
            "score_dtype": "model",
            "group_mask_fill": "0",
            "norm_topk_prob": True,
            "norm_eps": 1e-20,
        },
        {**GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    ),
    Peer(
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {
            "correction_bias": "score",
            "norm_topk_prob": True,
            "norm_eps": 1e-12,
            "norm_eps_mode": "clamp",
        },
        {"moe_norm_min": 1e-12, "moe_num_experts": E},
    ),
    Peer(
        "longcat_flash",
        "LongcatFlashTopkRouter",
        {"correction_bias": "score", "routed_scaling_factor": 6.0},
        {"n_routed_experts": E - 4, "zero_expert_num": 4, "routed_scaling_factor": 6.0},
        {
            "num_experts": E - 4,
            "num_null_experts": 4,
            "null_expert_kind": "identity",
            **F32_COMBINE,
        },
    ),
    Peer(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        {**MODEL, **SIGMOID, "score_dtype": "model", "norm_eps": 1e-6},
        {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        call=with_bias,
    ),
    Peer(
        "minimax_m2",
        "MiniMaxM2TopKRouter",
        {**MODEL, **SIGMOID},
        wiring=F32_COMBINE,
        call=with_bias,
    ),
    Peer(
        "laguna",
        "LagunaTopKRouter",
        {**MODEL, **SIGMOID, "router_logit_softcapping": 2.0},
        {"moe_router_logit_softcapping": 2.0},
    ),
    Peer(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {
            **MODEL,
            **SIGMOID,
            "scoring_func": "sqrtsoftplus",
            "score_dtype": "model",
            "norm_eps": 1e-20,
            "routed_scaling_factor": 1.5,
        },
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        dtypes=("float32",),  # in bfloat16 the module rounds between softplus and root
    ),
    Peer(
        "kolibri1",
        "Kolibri1TopKRouter",
        {**AFTER, "scoring_func": "sigmoid", "correction_bias": "logit", "norm_topk_prob": True},
        {"norm_topk_prob": True},
        F32_COMBINE,
    ),
    Peer(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterTopKRouter",
        {**AFTER, "routed_scaling_factor": 1 / K},
        wiring=F32_COMBINE,
    ),
    Peer(
        "phimoe",
        "PhimoeTopKRouter",
        {
            **MODEL,
            "num_experts_per_tok": 2,
            "scoring_func": "sparsemixer",
            "score_dtype": "model",
            "router_jitter_noise": 0.1,
        },
        {"num_experts_per_tok": 2, "router_jitter_noise": 0.1, "input_jitter_noise": 0.0},
    ),
    Peer(
        "dbrx",
        "DbrxRouter",
        {**MODEL, "score_dtype": "model", "norm_topk_prob": True, "norm_p": 2.0},
        {"moe_num_experts": E, "moe_jitter_eps": None},
        call=dbrx,
    ),
]


def build(peer: Peer, dtype: torch.dtype, bias: torch.Tensor) -> Any:
    """The module of transformers with an identity gate and the bias wherever it keeps one."""
    path = f"transformers.models.{peer.family}.modeling_{peer.family}"
    base = {
        "num_experts_per_tok": K,
        "num_experts": E,
        "num_local_experts": E,
        "hidden_size": E,
    }
    router = getattr(import_module(path), peer.module)(SimpleNamespace(**{**base, **peer.config}))
    router = router.to(dtype).eval()
    router.top_k, router.moe_normalize_expert_weights = peer.policy.get("num_experts_per_tok", K), 2
    state = router.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if value.shape == (E, E):
                value.copy_(torch.eye(E))
            elif name == "bias":
                value.zero_()
        for name in BIAS:
            if name in state:
                parent, _, leaf = name.rpartition(".")
                kept = bias.reshape(state[name].shape)
                getattr(router.get_submodule(parent), leaf).data = kept
    return router


@pytest.mark.parametrize(
    ("peer", "dtype"),
    [(peer, dtype) for peer in PEERS for dtype in peer.dtypes],
    ids=lambda value: value if isinstance(value, str) else value.family,
)
def test_one_spec_reproduces_the_module(peer: Peer, dtype: str) -> None:
    policy = RouterPolicy(**{"num_experts_per_tok": K, **peer.policy})
    wiring = RouterWiring(**{"num_experts": E, **peer.wiring})
    spec = RouterSpec(policy, wiring).resolved(dtype)
    rng = np.random.default_rng(0)
    bias = torch.from_numpy((0.2 * rng.normal(size=E) - 0.3).astype(np.float32))
    x = torch.from_numpy(rng.normal(size=(T, E)) * 1.5).to(getattr(torch, dtype))
    with torch.no_grad():
        router = build(peer, getattr(torch, dtype), bias)
        weights, ids = peer.call(router, x, bias)
    expected = np.zeros((T, E))
    np.put_along_axis(expected, ids.numpy(), weights.double().numpy(), axis=1)

    result = route(x.double().numpy(), spec, correction_bias=bias.numpy())
    found = np.zeros((T, E))
    np.put_along_axis(found, result.expert_ids.astype(int), result.weights, axis=1)
    # torch leaves exact ties to chance; bfloat16 has many
    clear = result.margin > 1e-6
    assert clear.sum() > T // 2
    coarse = weights.dtype == torch.bfloat16
    # modules that normalise in bfloat16 round once more than the spec does
    slack = dict(rtol=2.0**-7, atol=0) if coarse else dict(rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[clear], expected[clear], **slack)
