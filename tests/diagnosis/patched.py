"""transformers models whose routers make known mistakes, patched from outside.

Written against transformers' own modules and knowing nothing of moescope's kernels: a router's
logits are taken as its module computes them, and the choice and the weights are made again here, in
torch, with one thing wrong. What is wrong around a router is done to modules and weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tests.families import READ
from tests.families.kit import TOP_K


@dataclass(frozen=True)
class Traits:
    """How a family's router turns logits into experts and weights, and what is wrong with it."""

    k: int
    score: str = "softmax"  # softmax | sigmoid | sqrtsoftplus
    order: str = "score, choose"  # or "choose, score"
    norm: bool = False
    eps: float = 0.0
    clamp: float = 0.0
    scale: float = 1.0
    scaled_output: bool = False  # the factor is applied to what the experts give
    bias: Any = None  # [E], added for the choice
    groups: tuple[int, int] = (1, 1)  # how many, how many admitted
    group_score: str = "top2"
    fill: float = -torch.inf
    rounded: torch.dtype | None = None  # scores are made in it
    # what faults set
    biased_weights: bool = False
    subtracted: bool = False
    logits_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None
    twice: bool = False
    raw: bool = False
    higher_ids_win: bool = False
    each_group: bool = False
    first_when_negative: bool = False


def choose(logits: Any, t: Traits) -> tuple[Any, Any]:
    """logits [T, E] -> weights and ids [T, K], best first."""
    z = logits.float()
    if t.first_when_negative:
        first = torch.full_like(z, -torch.inf)
        first[:, : t.k] = 0.0
        z = torch.where((z.max(-1, keepdim=True).values < 0), first, z)
    if t.logits_dtype:
        z = z.to(t.logits_dtype).float()
    after = t.order == "choose, score"
    scores = z if after else _scored(z, t)
    bias = None if t.bias is None else t.bias.float().flatten()
    if bias is not None and t.bias_dtype:
        bias = bias.to(t.bias_dtype).float()
    ranked = scores if bias is None else scores + bias
    if t.rounded and bias is not None and t.bias_dtype in (None, t.rounded):
        ranked = ranked if t.bias_dtype is None else ranked.to(t.rounded).float()
    admissible = _grouped(ranked, t)
    ids = _best(admissible, t.k, t.higher_ids_win)
    weights = (ranked if t.biased_weights or t.subtracted else scores).gather(1, ids)
    if t.subtracted:
        weights = weights - bias[ids]
    if t.raw:
        weights = z.gather(1, ids)
    elif after:
        weights = _scored(z.gather(1, ids), t)
    if t.norm:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=t.clamp) if t.clamp else total + t.eps)
    if not t.scaled_output:
        weights = weights * t.scale
    return weights.to(t.weights_dtype or weights.dtype), ids


def _scored(z: Any, t: Traits) -> Any:
    for _ in range(2 if t.twice else 1):
        if t.score == "softmax":
            z = z.softmax(-1)
        elif t.score == "sigmoid":
            z = z.sigmoid()
        else:
            z = F.softplus(z).sqrt()
        if t.rounded:
            z = z.to(t.rounded).float()
    return z


def _grouped(ranked: Any, t: Traits) -> Any:
    n, admitted = t.groups
    if n == 1:
        return ranked
    parts = ranked.view(len(ranked), n, -1)
    if t.each_group:
        each = min(-(-t.k // n), parts.shape[-1])
        worst = parts.topk(each, -1).values[..., -1:]
        return parts.masked_fill(parts < worst, -torch.inf).flatten(1)
    counted = 2 if t.group_score == "top2" else 1
    of_group = parts.topk(counted, -1).values.sum(-1)
    allowed = torch.zeros_like(of_group).scatter(1, of_group.topk(admitted).indices, 1.0) > 0
    return parts.masked_fill(~allowed[..., None], t.fill).flatten(1)


def _best(values: Any, k: int, higher: bool) -> Any:
    if higher:
        order = torch.sort(values.flip(-1), dim=-1, descending=True, stable=True).indices
        return values.shape[-1] - 1 - order[:, :k]
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]


# --- families -----------------------------------------------------------------------------------

Describe = Callable[[Any, tuple[Any, ...], Any], Traits]  # (router module, its inputs, config)


def _softmax(norm: bool | None = None) -> Describe:
    def of(m: Any, inputs: Any, c: Any) -> Traits:
        return Traits(m.top_k, norm=m.norm_topk_prob if norm is None else norm)

    return of


def _deepseek(m: Any, inputs: Any, c: Any) -> Traits:
    return Traits(
        m.top_k,
        "sigmoid",
        norm=m.norm_topk_prob,
        eps=1e-20,
        scale=m.routed_scaling_factor,
        bias=m.e_score_correction_bias,
        groups=(m.num_group, m.topk_group),
    )


def _deepseek_v2(m: Any, inputs: Any, c: Any) -> Traits:
    limited = m.topk_method == "group_limited_greedy"
    return Traits(
        m.top_k,
        scale=m.routed_scaling_factor,
        groups=(m.num_group, m.topk_group) if limited else (1, 1),
        group_score="max",
        fill=0.0,
    )


def _gpt_oss(m: Any, inputs: Any, c: Any) -> Traits:
    rounded = m.weight.dtype if m.weight.dtype != torch.float32 else None
    return Traits(m.top_k, order="choose, score", rounded=rounded)


def _ernie(m: Any, inputs: Any, c: Any) -> Traits:
    bias = m.moe_statics.e_score_correction_bias
    return Traits(m.top_k, norm=True, clamp=m.norm_min, bias=bias)


def _given_bias(eps: float = 0.0) -> Describe:
    def of(m: Any, inputs: Any, c: Any) -> Traits:
        return Traits(m.top_k, "sigmoid", norm=True, eps=eps, bias=inputs[1])

    return of


DESCRIBE: dict[str, Describe] = {
    "olmoe": _softmax(),
    "flex_olmo": _softmax(),
    "qwen2_moe": _softmax(),
    "qwen3_moe": _softmax(),
    "qwen3_next": _softmax(),
    "qwen3_5_moe_text": _softmax(True),
    "mixtral": _softmax(True),
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek,
    "glm4_moe": _deepseek,
    "ernie4_5_moe": _ernie,
    "minimax_m2": _given_bias(),
    "granitemoe": lambda m, inputs, c: Traits(m.top_k, order="choose, score"),
}

# --- faults of the choice and the weights -------------------------------------------------------

Change = Callable[[Traits], Traits]


def _set(**fields: Any) -> Change:
    return lambda t: replace(t, **fields)


def _swapped_score(t: Traits) -> Traits:
    return replace(t, score="sigmoid" if t.score == "softmax" else "softmax")


BF16 = torch.bfloat16
CHOICE: dict[str, Change] = {
    "softmax_over_selected": _set(order="choose, score", norm=False),
    "no_renormalisation": _set(order="score, choose", norm=False),
    "always_renormalised": _set(norm=True),
    "wrong_scoring_func": _swapped_score,
    "softmax_and_bias_in_weights": _set(score="softmax", biased_weights=True),
    "raw_logits_as_weights": _set(raw=True, norm=False),
    "double_softmax": _set(twice=True),
    "bias_in_combine_weights": _set(biased_weights=True),
    "weights_by_subtracting_bias": _set(subtracted=True),
    "renorm_eps_missing": _set(eps=0.0, clamp=0.0),
    "renorm_eps_added": _set(eps=1e-6, clamp=0.0),
    "renorm_eps_clamped": _set(eps=0.0, clamp=2.0**-14),
    "scaling_missing": _set(scale=1.0),
    "scaling_twice": lambda t: replace(t, scale=t.scale**2),
    "scaling_site": lambda t: replace(t, scaled_output=not t.scaled_output),
    "selection_bias_dropped": _set(bias=None),
    "group_mask_zero": _set(fill=0.0),
    "group_score_max": _set(group_score="max"),
    "group_score_top2": _set(group_score="top2"),
    "group_limit_ignored": _set(groups=(1, 1)),
    "per_group_topk": _set(each_group=True),
    "forced_grouping": _set(groups=(8, 4)),
    "top_k_minus_one": lambda t: replace(t, k=t.k - 1),
    "top_k_plus_one": lambda t: replace(t, k=t.k + 1),
    "all_negative_logits": _set(first_when_negative=True),
    "tie_break": _set(higher_ids_win=True),
    "logits_bf16": _set(logits_dtype=BF16),
    "scores_bf16": _set(rounded=BF16),
    "bias_bf16": _set(bias_dtype=BF16),
    "combine_low_precision": _set(weights_dtype=BF16),
}

# --- faults around the router: (model, family) is changed in place -------------------------------

Around = Callable[[Any, str], None]


def routers_of(model: Any, family: str) -> list[Any]:
    pattern = READ.get(family, TOP_K).modules
    return [m for m in model.modules() if re.search(pattern, type(m).__name__)]


def blocks_of(model: Any, family: str) -> list[Any]:
    """The modules that hold a router and experts, in the order of `routers_of`."""
    routers = {id(router) for router in routers_of(model, family)}
    return [m for m in model.modules() if any(id(child) in routers for child in m.children())]


ROW_TENSORS = ("weight", "bias", "e_score_correction_bias")


def _move_rows(order: Callable[[Any], Any]) -> Around:
    def change(model: Any, family: str) -> None:
        for router in routers_of(model, family):
            for name in ROW_TENSORS:
                held = getattr(router, name, None)
                if held is not None:
                    held.data.copy_(order(held.data.clone()))

    return change


def _gate_of(offset: int) -> Around:
    def change(model: Any, family: str) -> None:
        routers = routers_of(model, family)
        states = [copy.deepcopy(router.state_dict()) for router in routers]
        for number, router in enumerate(routers):
            other = min(max(number + offset, 0), len(routers) - 1)
            router.load_state_dict(states[other])

    return change


def _move_experts(order: Callable[[Any], Any]) -> Around:
    def change(model: Any, family: str) -> None:
        for block in blocks_of(model, family):
            for tensor in block.experts.parameters():
                tensor.data.copy_(order(tensor.data.clone()))

    return change


def _halves(rows: Any) -> Any:
    return rows.roll(-(len(rows) // 2), 0)


def _swap_gate_up(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        for name, tensor in block.experts.named_parameters():
            if "gate_up" not in name:
                continue
            if family == "gpt_oss":  # interleaved, in the last dimension
                swapped = tensor.data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            else:
                gate, up = tensor.data.chunk(2, 1)
                swapped = torch.cat((up, gate), 1)
            tensor.data.copy_(swapped)


def _shared_of(block: Any) -> Any:
    names = ("shared_experts", "shared_expert", "shared_mlp")
    return next(m for name in names if (m := getattr(block, name, None)) is not None)


def _scale_shared(power: int | None) -> Around:
    """Multiply the shared expert by the factor to this power; None: by 0."""

    def change(model: Any, family: str) -> None:
        for block, router in zip(blocks_of(model, family), routers_of(model, family), strict=True):
            factor = 0.0 if power is None else float(router.routed_scaling_factor) ** power
            _shared_of(block).down_proj.weight.data.mul_(factor)

    return change


def _open_shared_gate(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        block.shared_expert_gate.forward = lambda x: x.new_full((*x.shape[:-1], 1), torch.inf)


def _reads(capture: Callable[[Any, str], Callable[[Any, Any], Any]]) -> Around:
    def change(model: Any, family: str) -> None:
        for block, router in zip(blocks_of(model, family), routers_of(model, family), strict=True):
            other, inner = capture(model, family)(block, router), router.forward
            router.forward = lambda x, *rest, inner=inner, other=other: inner(
                other().reshape(-1, x.shape[-1]).to(x.dtype), *rest
            )

    return change


def _residual(model: Any, family: str) -> Any:
    """What the norm before the experts was given."""

    def of(block: Any, router: Any) -> Any:
        layer = next(m for m in model.modules() if any(c is block for c in m.children()))
        norm = next(
            getattr(layer, name)
            for name in ("post_attention_layernorm", "ffn_norm", "pre_feedforward_layernorm")
            if hasattr(layer, name)
        )
        seen: list[Any] = []
        norm.register_forward_pre_hook(lambda m, inputs: seen.__setitem__(slice(None), inputs[:1]))
        return lambda: seen[0]

    return of


def _embedding(model: Any, family: str) -> Any:
    def of(block: Any, router: Any) -> Any:
        seen: list[Any] = []
        embed = model.get_input_embeddings()
        embed.register_forward_hook(lambda m, i, out: seen.__setitem__(slice(None), [out]))
        return lambda: seen[0]

    return of


def _quantise_gate(bits: int) -> Around:
    def change(model: Any, family: str) -> None:
        for router in routers_of(model, family):
            weight = router.weight.data.double()
            step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            router.weight.data.copy_((weight / step).round() * step)

    return change


def _no_gate_bias(model: Any, family: str) -> None:
    for router in routers_of(model, family):
        router.bias.data.zero_()


def _bias_bytes(model: Any, family: str) -> None:
    for router in routers_of(model, family):
        holder = getattr(router, "moe_statics", router)
        bias = holder.e_score_correction_bias
        read = bias.data.float().contiguous().view(BF16).flatten()[: bias.numel()]
        bias.data.copy_(read.float().view(bias.shape))


def _unweighted_bias(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        experts, inner = block.experts, block.experts.forward

        def forward(
            x: Any, ids: Any, weights: Any, experts: Any = experts, inner: Any = inner
        ) -> Any:
            out = inner(x, ids, weights)
            missing = (
                (1.0 - weights.float())[..., None] * experts.down_proj_bias[ids].float()
            ).sum(-2)
            return out + missing.view_as(out).to(out.dtype)

        experts.forward = forward


AROUND: dict[str, Around] = {
    "gate_rows_shifted": _move_rows(lambda rows: rows.roll(1, 0)),
    "gate_rows_reversed": _move_rows(lambda rows: rows.flip(0)),
    "gate_of_next_layer": _gate_of(+1),
    "gate_of_previous_layer": _gate_of(-1),
    "experts_shifted": _move_experts(lambda rows: rows.roll(-1, 0)),
    "experts_reversed": _move_experts(lambda rows: rows.flip(0)),
    "experts_halves_swapped": _move_experts(_halves),
    "gate_up_swapped": _swap_gate_up,
    "shared_dropped": _scale_shared(None),
    "shared_gate_missing": _open_shared_gate,
    "shared_scaled": _scale_shared(-1),
    "shared_scaled_up": _scale_shared(+1),
    "router_reads_residual": _reads(_residual),
    "router_reads_embedding": _reads(_embedding),
    "router_quantised": _quantise_gate(8),
    "router_quantised_4_bits": _quantise_gate(4),
    "router_linear_bias_missing": _no_gate_bias,
    "bias_fp32_where_bf16_expected": _bias_bytes,
    "expert_bias_unweighted": _unweighted_bias,
}
WRITTEN = (*CHOICE, *AROUND)


# --- models that make them, and what they then do -----------------------------------------------


def patched(model: Any, family: str, *faults: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of `model` in `dtype` with these faults."""
    model = copy.deepcopy(model).to(dtype)
    read, config = READ.get(family, TOP_K), model.config
    changes = [CHOICE[name] for name in faults if name in CHOICE]
    for name in faults:
        if name in AROUND:
            AROUND[name](model, family)
    for router, block in zip(routers_of(model, family), blocks_of(model, family), strict=True):
        inner = router.forward
        if not changes:
            continue

        def forward(*inputs: Any, inner: Any = inner, router: Any = router, **named: Any) -> Any:
            out = inner(*inputs, **named)
            logits, weights, _ = read.listen(router, inputs, out)
            traits = DESCRIBE[family](router, inputs, config)
            for change in changes:
                traits = change(traits)
            new, ids = choose(logits, traits)
            router.output_scale = traits.scale if traits.scaled_output else 1.0
            return (out[0], new.to(weights.dtype), ids, *out[3:])

        router.forward = forward
        block.experts.forward = _scaled(block.experts.forward, router)
    return model


def _scaled(inner: Any, router: Any) -> Any:
    return lambda *inputs: inner(*inputs) * getattr(router, "output_scale", 1.0)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one sequence was routed to; ids best first."""

    token_ids: tuple[int, ...]
    expert_ids: Any  # [T, L, K]
    weights: Any  # [T, L, K]


def generate(model: Any, family: str, prompt: tuple[int, ...], new_tokens: int) -> Recorded:
    """Greedy, through the model's own cache; every token fed is recorded, the last one too."""
    read = READ.get(family, TOP_K)
    heard: list[Any] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        _, weights, ids = read.listen(module, inputs, output)
        heard.append((weights.float(), ids))

    routers = routers_of(model, family)
    handles = [router.register_forward_hook(hook) for router in routers]
    rows, ids, cache, fed = [], list(prompt), None, torch.tensor([prompt])
    try:
        with torch.no_grad():
            for step in range(new_tokens + 1):
                out = model(fed, past_key_values=cache, use_cache=True)
                rows.append([torch.stack([h[i] for h in heard], 1) for i in (0, 1)])
                heard.clear()
                if step < new_tokens:
                    cache = out.past_key_values
                    ids.append(int(out.logits[0, -1].argmax()))
                    fed = torch.tensor([ids[-1:]])
    finally:
        for handle in handles:
            handle.remove()
    weights, chosen = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    return Recorded(tuple(ids), chosen.numpy(), weights.numpy())
