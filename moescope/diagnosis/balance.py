"""How evenly experts are used: pure functions over loads, and over sums of router probabilities.

Each docstring gives the formula, the value of a perfectly balanced router, and where the measure
comes from. A load n[l, e] counts the tokens for which router l picked expert e (`expert_load` in
`trace.measures`); N is the sum of a router's load, m = N / E its mean. What chance alone does to
these numbers is in `balance_chance.py`; a whole trace is summed up in `balance_report.py`.

Letters: T tokens, L routers, E expert classes of those routers (null experts included), K picked.
Routers without picks give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace import measures

Load = NDArray[np.integer[Any]]  # [L, E]
Floats = NDArray[np.floating[Any]]
COLD = 0.1  # of the fair share: an expert with less is cold


# --- of a load ------------------------------------------------------------------------------------


def variation(load: Load) -> Floats:
    """Coefficient of variation of the load. [L, E] -> [L].

    Formula: sqrt(mean over e of (n_e − m)²) / m.
    Balanced: 0. All picks on one expert: sqrt(E − 1).
    Source: Shazeer et al. 2017, arXiv:1701.06538, whose load loss is its square.
    """
    return measures.load_variation(load)


def max_over_mean(load: Load) -> Floats:
    """The busiest expert's load over the mean: how long the slowest of E devices takes, one expert
    each. Its inverse is the "balancedness" that vLLM and SGLang log. [L, E] -> [L].

    Formula: max over e of n_e / m.
    Balanced: 1. All picks on one expert: E.
    Source: vLLM's and SGLang's EPLB metrics.
    """
    return np.asarray(measures.relative_load(load).max(axis=1))


def max_violation(load: Load) -> Floats:
    """MaxVio: how far the busiest expert is above the mean. [L, E] -> [L].

    Formula: (max over e of n_e − m) / m.
    Balanced: 0. All picks on one expert: E − 1.
    Source: Wang et al. 2024, arXiv:2408.15664 (MaxVio_global: counted over all tokens).
    """
    return max_over_mean(load) - 1


def gini(load: Load) -> Floats:
    """Gini coefficient of the load. [L, E] -> [L].

    Formula: Σ over e, f of |n_e − n_f| / (2 E N).
    Balanced: 0. All picks on one expert: 1 − 1 / E.
    Source: Gini 1912; as `2 Σ i n_(i) / (E N) − (E + 1) / E` over the sorted load.
    """
    share = np.sort(measures.relative_load(load), axis=1)
    E = share.shape[1]
    return np.asarray(2 * (share @ np.arange(1.0, E + 1)) / E**2 - (E + 1) / E)


def jain(load: Load) -> Floats:
    """Jain's fairness index. [L, E] -> [L].

    Formula: N² / (E Σ over e of n_e²), which is 1 / (1 + CV²).
    Balanced: 1. All picks on one expert: 1 / E.
    Source: Jain, Chiu and Hawe 1984, DEC-TR-301.
    """
    return np.asarray(1 / np.mean(measures.relative_load(load) ** 2, axis=1))


def effective_experts(load: Load) -> Floats:
    """The share of experts that an even load of the same entropy would use. [L, E] -> [L].

    Formula: exp(H) / E with H = −Σ over e of p_e ln p_e and p_e = n_e / N.
    Balanced: 1. All picks on one expert: 1 / E.
    Source: Hill 1973, the diversity number of order 1.
    """
    p = measures.relative_load(load) / load.shape[1]
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), p).sum(axis=1)
    return np.asarray(np.exp(entropy) / load.shape[1])


def dead(load: Load) -> NDArray[np.int64]:
    """Experts that were never picked. [L, E] -> [L].

    Formula: the number of e with n_e = 0, in a router that picked something.
    Balanced: 0, once there are enough tokens (`balance_chance.expected_dead`).
    Source: "dead experts" in Fedus et al. 2021, arXiv:2101.03961, and every trainer since.
    """
    return np.asarray(measures.dead_experts(load).sum(axis=1), np.int64)


def cold(load: Load) -> NDArray[np.int64]:
    """Experts that were picked, but less than a tenth of their fair share. [L, E] -> [L].

    Formula: the number of e with 0 < n_e < 0.1 m.
    Balanced: 0.
    Source: ours; calibration sets miss such experts (llama.cpp #15060).
    """
    share = measures.relative_load(load)
    return np.asarray(((share > 0) & (share < COLD)).sum(axis=1), np.int64)


def coverage(load: Load, top: int) -> Floats:
    """The share of all picks that the `top` busiest experts took. [L, E] -> [L].

    Formula: Σ of the `top` largest n_e / N.
    Balanced: top / E.
    Source: the concentration curve of Megatron-LM's RouterTracer (#5220).
    """
    share = np.sort(measures.relative_load(load), axis=1)[:, ::-1]
    return np.asarray(share[:, :top].sum(axis=1) / load.shape[1])


def distance(load: Load, other: Load) -> Floats:
    """How differently two sets of tokens use the experts, e.g. prefill and decode. [L, E] -> [L].

    Formula: ½ Σ over e of |n_e / N − n'_e / N'|, the total variation distance.
    Balanced: 0 where both use them alike; 1 where they share none.
    Source: the definition of total variation; Megatron's analyser has `--decode-only` for this.
    """
    difference = measures.relative_load(load) - measures.relative_load(other)
    return np.asarray(np.abs(difference).sum(axis=1) / (2 * load.shape[1]))


# --- auxiliary losses -----------------------------------------------------------------------------


def pooled_loss(picks: Floats, probability: Floats, rows: Floats) -> float:
    """The auxiliary loss as transformers computes it: counts and probabilities are pooled over all
    layers *before* they are multiplied, so that opposite imbalances of two layers cancel.

    `picks` [L, E] counts the top K of the softmax, `probability` [L, E] sums the softmax over
    tokens, `rows` [L] counts them.

    Formula: E Σ over e of f_e P_e with f_e = Σ_l picks / Σ_l rows (their sum is K, not 1) and
    P_e = Σ_l probability / Σ_l rows.
    Balanced: K, not 1.
    Source: `load_balancing_loss_func` of transformers (mixtral, olmoe, qwen*_moe, ...); #43775
    proposed to divide it by K and was closed, #28255 asks for it per layer.
    """
    total = float(np.sum(rows))
    if not total:
        return float("nan")
    f, P = picks.sum(axis=0) / total, probability.sum(axis=0) / total
    return float(picks.shape[1] * (f @ P))


def layer_loss(picks: Floats, probability: Floats, rows: Floats) -> Floats:
    """The auxiliary loss of each layer by itself, with fractions that sum to 1. [L, E] -> [L].

    `picks` counts what the router chose, `probability` sums over tokens the scores divided by their
    sum over experts, `rows` [L] counts the tokens.

    Formula: E Σ over e of f_e P_e with f_e = picks_e / Σ picks and P_e = probability_e / rows.
    Balanced: 1.
    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6 (K = 1); DeepSeek-V3,
    arXiv:2412.19437, equations 17 to 20 (any K, any score), without its factor alpha.
    """
    total = np.asarray(picks.sum(axis=1), np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        f, P = picks / total[:, None], probability / np.asarray(rows, np.float64)[:, None]
    return np.asarray(picks.shape[1] * (f * P).sum(axis=1))


def sequence_loss(parts: Sequence[tuple[Floats, Floats, Floats]]) -> Floats:
    """The mean over sequences of `layer_loss`, each given as (picks, probability, rows). -> [L].

    Formula: mean over sequences s of E Σ over e of f_se P_se.
    Balanced: 1. A router that is even over all tokens and specialised in each sequence is above 1.
    Source: DeepSeek-V3, arXiv:2412.19437, equation 17 ("complementary sequence-wise").
    """
    losses = np.stack([layer_loss(*part) for part in parts])
    known = np.isfinite(losses)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, losses, 0.0).sum(axis=0) / known.sum(axis=0))


def z_terms(logits: Floats) -> Floats:
    """What the router z-loss is the mean of. [..., E] -> [...].

    Formula: (ln Σ over e of exp(logit_e))²; the z-loss is its mean over tokens.
    Balanced: it says how large logits are, not how even; logits that are all 0 give (ln E)².
    Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, equation 5.
    """
    top = logits.max(axis=-1)
    with np.errstate(invalid="ignore"):
        total = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    return np.asarray(total**2)


def softmax(logits: Floats) -> Floats:
    """[..., E] in float64; −inf is an expert that is left out."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


# --- co-activation --------------------------------------------------------------------------------


def pair_counts(expert_ids: NDArray[np.integer[Any]], num_experts: int) -> NDArray[np.int64]:
    """How often two experts were picked for the same token. [T, K] -> [E, E], symmetric; the
    diagonal is the load.

    Formula: n_ef = the number of tokens whose picks hold both e and f.
    Balanced: T K (K − 1) / (E (E − 1)) for every pair.
    Source: co-activation in OLMoE, arXiv:2409.02060, section 5.
    """
    ids = np.sort(expert_ids.astype(np.int64), axis=1)
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1  # an expert twice in one row is one pick
    used = (ids >= 0) & (ids < num_experts)
    both = used[:, :, None] & used[:, None, :]
    cells = (ids[:, :, None] * num_experts + ids[:, None, :])[both]
    counts = np.bincount(cells, minlength=num_experts**2)
    return np.asarray(counts.reshape(num_experts, num_experts), np.int64)


def lift(pairs: NDArray[np.integer[Any]], tokens: int) -> Floats:
    """How much more often than independent picks two experts come together. [E, E] -> [E, E].

    Formula: n_ef T / (n_e n_f); NaN where either was never picked, and on the diagonal.
    Balanced: (K − 1) E / (K (E − 1)), a little below 1: K picks differ from each other.
    Source: Brin, Motwani, Ullman and Tsur 1997 ("interest", later lift).
    """
    load = np.diagonal(pairs).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(
            load[:, None] * load > 0, pairs * float(tokens) / (load[:, None] * load), np.nan
        )
    np.fill_diagonal(found, np.nan)
    return np.asarray(found)
