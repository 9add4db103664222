"""transformers models whose routers make known mistakes, patched from outside, and what they do.

A router's logits are taken as its module computes them; the choice and the weights are made again
(`choice.py`), with one thing wrong. What is wrong around a router is done to modules and weights
(`around.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from tests.diagnosis.around import AROUND, blocks_of, routers_of
from tests.diagnosis.choice import CHOICE, choose
from tests.diagnosis.described import DESCRIBE, replaced
from tests.families import READ
from tests.families.kit import TOP_K

WRITTEN = (*CHOICE, *AROUND)


def patched(model: Any, family: str, *faults: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of `model` in `dtype` with these faults."""
    model = copy.deepcopy(model)
    changes = [CHOICE[name] for name in faults if name in CHOICE]
    for name in faults:
        if name in AROUND:
            AROUND[name](model, family)
    model.to(dtype)
    if changes:
        for router, block in zip(routers_of(model, family), blocks_of(model, family), strict=True):
            _patch(router, block, family, changes)
    return model


def _patch(router: Any, block: Any, family: str, changes: list[Any]) -> None:
    read, inner = READ.get(family, TOP_K), router.forward
    factor = [1.0]

    def forward(*inputs: Any, **named: Any) -> Any:
        out = inner(*inputs, **named)
        logits, _, _ = read.listen(router, inputs, out)
        traits = DESCRIBE[family](router, inputs, block)
        native = traits.native_output
        for change in changes:
            traits = change(traits)
        weights, ids = choose(logits, traits)
        factor[0] = (traits.scale if traits.scaled_output else 1.0) / native
        return replaced(family, out, weights, ids)

    experts = block.experts.forward
    router.forward = forward
    block.experts.forward = lambda *inputs: experts(*inputs) * factor[0]


def round_experts(model: Any, family: str, bits: int = 8) -> Any:
    """A copy whose experts hold `bits` for each weight, a scale for each row."""
    model = copy.deepcopy(model)
    for block in blocks_of(model, family):
        for tensor in block.experts.parameters():
            wide = tensor.data.double()
            step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            tensor.data.copy_((wide / step).round() * step)
    return model


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one sequence was routed to, as the module said it."""

    token_ids: tuple[int, ...]
    expert_ids: Any  # [T, L, K]
    weights: Any  # [T, L, K]


def generate(
    model: Any, family: str, prompts: list[tuple[int, ...]], new_tokens: int
) -> list[Recorded]:
    """Greedy, through the model's own cache, prompts of one length beside each other; every token
    fed is recorded, the last one too."""
    read = READ.get(family, TOP_K)
    heard: list[Any] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        _, weights, ids = read.listen(module, inputs, output)
        heard.append((weights.float(), ids))

    handles = [router.register_forward_hook(hook) for router in routers_of(model, family)]
    fed, cache = torch.tensor(prompts), None
    ids, rows = [fed], []
    try:
        with torch.no_grad():
            for step in range(new_tokens + 1):
                out = model(fed, past_key_values=cache, use_cache=True)
                rows.append([_by_sequence([h[i] for h in heard], fed) for i in (0, 1)])
                heard.clear()
                if step < new_tokens:
                    cache = out.past_key_values
                    fed = out.logits[:, -1:].argmax(-1)
                    ids.append(fed)
    finally:
        for handle in handles:
            handle.remove()
    weights, chosen = (torch.cat([row[i] for row in rows], 1).numpy() for i in (0, 1))
    tokens = torch.cat(ids, 1).tolist()
    return [Recorded(tuple(t), c, w) for t, c, w in zip(tokens, chosen, weights, strict=True)]


def _by_sequence(routers: list[Any], fed: Any) -> Any:
    """Rows [B × T, K] of each router as [B, T, L, K]."""
    return torch.stack([rows.view(*fed.shape, -1) for rows in routers], 2)
