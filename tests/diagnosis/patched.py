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

from tests.diagnosis.around import AROUND, blocks_of, experts_of, parent_of, routers_of
from tests.diagnosis.choice import CHOICE, choose
from tests.diagnosis.described import DESCRIBE, LOGITS, replaced
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
    _cast(model, dtype)
    if changes:
        for router, block in zip(routers_of(model, family), blocks_of(model, family), strict=True):
            PATCHES.get(family, _patch)(model, router, block, family, changes)
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """As `from_pretrained` does: what a class makes in float32, or keeps so, stays."""
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    with torch.device("meta"):
        made = type(model)._from_config(config, dtype=dtype)
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    dtypes = {name: tensor.dtype for name, tensor in _tensors(made)}
    for name, tensor in _tensors(model):
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtypes[name])


def _tensors(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _patch(model: Any, router: Any, block: Any, family: str, changes: list[Any]) -> None:
    read, inner = READ.get(family, TOP_K), router.forward
    factor = [1.0]

    def forward(*inputs: Any, **named: Any) -> Any:
        out = inner(*inputs, **named)
        logits, _, _ = read.listen(router, inputs, out)
        logits = LOGITS[family](router, *inputs) if family in LOGITS else logits
        traits = DESCRIBE[family](router, inputs, block)
        native = traits.native_output
        for change in changes:
            traits = change(traits)
        weights, ids = choose(logits, traits)
        factor[0] = (traits.scale if traits.scaled_output else 1.0) / native
        router.decided = weights.to(out[0 if family == "llama4_text" else 1].dtype), ids
        return replaced(family, out, weights, ids)

    experts = block.experts.forward
    router.forward = forward
    block.experts.forward = lambda *inputs: experts(*inputs) * factor[0]


def _patch_block(model: Any, router: Any, block: Any, family: str, changes: list[Any]) -> None:
    """DBRX: a method of the block decides."""

    def decide(logits: Any) -> Any:
        traits = DESCRIBE[family](router, (), block)
        for change in changes:
            traits = change(traits)
        weights, ids = choose(logits, traits)
        return weights.to(logits.dtype), ids

    block.route_tokens_to_experts = decide


def _patch_sorted(model: Any, router: Any, block: Any, family: str, changes: list[Any]) -> None:
    """JetMoE: the router returns rows sorted by expert; how many they are, attention knows too."""
    inner = router.forward
    owners = [m for m in (block, parent_of(model, block)) if hasattr(m, "top_k")]

    def forward(x: Any) -> Any:
        logits = inner(x)[-1]
        traits = DESCRIBE[family](router, (), block)
        for change in changes:
            traits = change(traits)
        weights, ids = choose(logits, traits)
        router.decided = weights, ids = weights.type_as(x), ids
        for owner in owners:
            owner.top_k = traits.k
        order = ids.flatten().argsort(stable=True)
        rows = order.div(traits.k, rounding_mode="trunc")
        sizes = ids.flatten().bincount(minlength=logits.shape[1]).tolist()
        return order, rows, weights.flatten()[order], sizes, logits

    router.forward = forward


PATCHES = {"dbrx": _patch_block, "jetmoe": _patch_sorted}


def round_experts(model: Any, family: str, bits: int = 8) -> Any:
    """A copy whose experts hold `bits` for each weight, a scale for each row."""
    model = copy.deepcopy(model)
    for block in blocks_of(model, family):
        for tensor in experts_of(block):
            wide = tensor.double()
            step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            tensor.copy_((wide / step).round() * step)
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
        _, *decided = read.listen(module, inputs, output)
        weights, ids = getattr(module, "decided", decided)
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
