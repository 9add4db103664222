"""What needs a CUDA device: the torch router there, and the demo model's tokens.

Seeded numpy cases and nothing but pytest, numpy and torch, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moescope.demo import CHECKPOINT
from moescope.kernels import agreement, route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring, Routing

pytestmark = pytest.mark.gpu

POLICIES = {
    "olmoe": {"num_experts_per_tok": 8},
    "qwen3": {"num_experts_per_tok": 8, "norm_topk_prob": True},
    "granite": {"num_experts_per_tok": 8, "score_order": "topk_then_score"},
    "deepseek_v3": {
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "correction_bias": "score",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "routed_scaling_factor": 2.5,
    },
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("experts", [64, 256])
def test_the_router_agrees_with_the_reference(name: str, experts: int) -> None:
    import torch

    random = np.random.default_rng(experts)
    logits = random.normal(0, 2, (512, experts)).astype(np.float32)
    logits[:64] = logits[:64].round(1)  # ties
    logits[64:80, ::3] = -np.inf
    logits[80, 5] = np.nan
    spec = RouterSpec(RouterPolicy(**POLICIES[name]), RouterWiring(experts)).resolved("float32")  # type: ignore[arg-type]
    bias = random.normal(0, 1, experts).astype(np.float32)
    bias = bias if spec.policy.correction_bias != "none" else None
    expected = route(logits, spec, correction_bias=bias)
    found = route(
        torch.from_numpy(logits).cuda(),
        spec,
        correction_bias=None if bias is None else torch.from_numpy(bias).cuda(),
        backend="torch",
    )
    assert found.expert_ids.is_cuda
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    on_host = Routing(**{k: v.cpu() if v is not None else None for k, v in fields.items()})
    assert agreement.compare(expected, on_host, spec, logits, correction_bias=bias) == []


@pytest.mark.parametrize("variant", ["trained", "softmax_over_selected"])
def test_the_demo_model_says_the_same_on_both_devices(variant: str) -> None:
    from moescope.engine.load import load_model
    from moescope.engine.protocol import Generate, LoadRequest, Sampling
    from moescope.engine.session import Session

    request = Generate(prompt_ids=(40, 41, 42, 43), sampling=Sampling(max_new_tokens=48))
    frames = []
    for device in ("cpu", "cuda"):
        model = load_model(LoadRequest(str(CHECKPOINT), device=device, dtype="float32"))
        session = Session(model, variants=(variant,))
        frames.append(list(session.generate(request)))
    for one, other in zip(*frames, strict=True):
        assert one.token_id == other.token_id
        clear = one.margin > 1e-4
        assert (np.sort(one.expert_ids[clear]) == np.sort(other.expert_ids[clear])).all()
        assert np.abs(one.score_sum - other.score_sum).max() < 1e-4
