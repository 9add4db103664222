"""A router's choice and weights from its logits, in torch, with one thing wrong.

Written from what transformers' modules do, and knowing nothing of moescope's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Traits:
    """How a family's router turns logits into experts and weights, and what is wrong with it."""

    k: int
    score: str = "softmax"  # softmax | sigmoid | sqrtsoftplus | sparsemixer
    after: bool = False  # only the chosen are scored
    norm: bool = False
    eps: float = 0.0
    clamp: float = 0.0
    scale: float = 1.0
    scaled_output: bool = False  # the factor is applied to what the experts give
    native_output: float = 1.0  # a factor that the block applies to that by itself
    bias: Any = None  # [E], added for the choice
    bias_on_logits: bool = False
    per_expert: Any = None  # [E], multiplies the weights last
    skips: int | None = None  # classes from this one on weigh nothing
    groups: tuple[int, int] = (1, 1)  # how many, how many admitted
    group_score: str = "top2"
    fill: float = -torch.inf
    rounded: torch.dtype | None = None  # scores are made in it
    jitter: float = 0.0
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
    z = _altered(logits.float(), t)
    scores = z if t.after else _scored(z, t)
    biased = _biased(z, scores, t)
    ids = _best(_grouped(biased, t), t.k, t.higher_ids_win)
    if t.score == "sparsemixer" and not t.raw:
        weights = _sparsemixer(z, ids, t.jitter, t.rounded or torch.float32)
    else:
        weights = _weights(z, scores, biased, ids, t)
    if t.norm:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=t.clamp) if t.clamp else total + t.eps)
    if t.per_expert is not None:
        weights = weights * t.per_expert.float()[ids]
    if not t.scaled_output:
        weights = weights * t.scale
    if t.skips is not None:
        weights = weights.masked_fill(ids >= t.skips, 0.0)
    return weights.to(t.weights_dtype or weights.dtype), ids


def _altered(z: Any, t: Traits) -> Any:
    if t.first_when_negative:
        first = torch.full_like(z, -torch.inf)
        first[:, : t.k] = 0.0
        z = torch.where((z.max(-1, keepdim=True).values < 0), first, z)
    return z.to(t.logits_dtype).float() if t.logits_dtype else z


def _bias(t: Traits) -> Any:
    bias = t.bias.float().flatten()
    return bias.to(t.bias_dtype).float() if t.bias_dtype else bias


def _biased(z: Any, scores: Any, t: Traits) -> Any:
    """What is ranked."""
    if t.bias is None:
        return scores
    ranked = (z if t.bias_on_logits else scores) + _bias(t)
    return ranked.masked_fill(z.isneginf(), -torch.inf)  # no bias brings back what is excluded


def _weights(z: Any, scores: Any, biased: Any, ids: Any, t: Traits) -> Any:
    if t.raw:
        return z.gather(1, ids)
    if t.biased_weights and t.bias_on_logits:
        return _scored(biased.gather(1, ids), t)
    if t.biased_weights:
        return biased.gather(1, ids)
    if t.subtracted:
        return biased.gather(1, ids) - _bias(t)[ids]
    return _scored(z.gather(1, ids), t) if t.after else scores.gather(1, ids)


def _sparsemixer(z: Any, ids: Any, jitter: float, dtype: torch.dtype) -> Any:
    """Each expert's own softmax over the logits near it; the second's without the first."""
    weights, left = [], z.clone()
    for k in range(2):
        top = z.gather(1, ids[:, k : k + 1])
        apart = (top - z).to(dtype).float() / torch.maximum(z.abs(), top)
        far = apart.to(dtype) > torch.tensor(2 * jitter, dtype=dtype)
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, ids[:, k : k + 1]))
        left = left.scatter(1, ids[:, k : k + 1], -torch.inf)
    return torch.cat(weights, -1).to(dtype).float()


def _scored(z: Any, t: Traits) -> Any:
    for _ in range(2 if t.twice else 1):
        if t.score in ("softmax", "sparsemixer"):
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


# --- faults ---------------------------------------------------------------------------------------

Change = Callable[[Traits], Traits]


def _set(**fields: Any) -> Change:
    return lambda t: replace(t, **fields)


def _swapped_score(t: Traits) -> Traits:
    return replace(t, score="sigmoid" if t.score == "softmax" else "softmax")


BF16 = torch.bfloat16
CHOICE: dict[str, Change] = {
    "softmax_over_selected": _set(after=True, norm=False),
    "no_renormalisation": lambda t: replace(t, after=False, norm=False),
    "always_renormalised": _set(norm=True),
    "top1_normalised": _set(norm=True),
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
    "sparsemixer_as_softmax": _set(score="softmax", norm=True),
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
