"""What chance alone does to a load: how uneven K picks a token look under a perfectly even router.

The null model: every token picks K of E experts, all sets alike, tokens independently. A load is
then binomial (T, K / E) in each expert, with negative correlation −1 / (E − 1) between experts.
Tokens of one text are not independent, so real text needs more tokens than these floors say: a
measure below its floor is certainly noise, one a little above it is not certainly imbalance.
No scipy: the distributions are summed here. Letters as in `balance.py`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05  # chance alone exceeds a bound this often


def expected_variation(tokens: int, num_experts: int, k: float) -> float:
    """The CV that an even router shows after T tokens (root of the mean square; exact).

    Formula: sqrt((E − K) / (K T)). 0 where K = E.
    Source: the variance T (K/E)(1 − K/E) of a binomial load over its squared mean.
    """
    if tokens <= 0:
        return math.nan
    return math.sqrt(max(0.0, num_experts - k) / (k * tokens))


def expected_max_violation(tokens: int, num_experts: int, k: float) -> float:
    """The MaxVio that an even router shows after T tokens, on average.

    Formula: E[max over e of n_e] / m − 1 with n_e binomial, the maximum taken as of independent
    experts and its distance from m stretched by sqrt(E / (E − 1)) for their correlation. Off by
    some per cent of itself (the tests compare it with simulation).
    """
    return _scaled(_largest(tokens, num_experts, k)[0], tokens, num_experts, k)


def bound_max_violation(tokens: int, num_experts: int, k: float) -> float:
    """The MaxVio that an even router exceeds in 5 % of cases; see `expected_max_violation`."""
    return _scaled(_largest(tokens, num_experts, k)[1], tokens, num_experts, k)


def expected_dead(tokens: int, num_experts: int, k: float) -> float:
    """Experts an even router has never picked after T tokens.

    Formula: E (1 − K / E)^T.
    """
    return num_experts * max(0.0, 1 - k / num_experts) ** tokens


def chi_square(variation: float, tokens: int, num_experts: int, k: float) -> float:
    """The statistic that is chi-square distributed with E − 1 degrees under an even router.

    Formula: (E − 1) CV² / ((E − K) / (K T)); for K = 1 it is Pearson's Σ (n_e − m)² / m. The factor
    1 / (1 − K/E) beyond that is due to picks without replacement. NaN where K = E.
    Source: Pearson 1900; for samples without replacement, the finite population correction.
    """
    floor = expected_variation(tokens, num_experts, k)
    if not floor > 0:
        return math.nan
    return (num_experts - 1) * (variation / floor) ** 2


def p_value(statistic: float, degrees: int) -> float:
    """How often chance exceeds `statistic`: the upper tail of chi-square, summed exactly.

    Formula: for even degrees exp(−x/2) Σ over j < degrees/2 of (x/2)^j / j!; for odd ones
    erfc(sqrt(x/2)) + exp(−x/2) Σ over j of (x/2)^(j − 1/2) / Γ(j + 1/2).
    """
    if math.isnan(statistic) or degrees < 1:
        return math.nan
    half = statistic / 2
    if half <= 0:
        return 1.0
    odd = degrees % 2
    total = math.erfc(math.sqrt(half)) if odd else 0.0
    for j in range(degrees // 2):
        power = j + 0.5 * odd
        total += math.exp(power * math.log(half) - half - math.lgamma(power + 1))
    return min(1.0, total)


def critical(degrees: int, level: float = LEVEL) -> float:
    """The chi-square value that chance exceeds with probability `level`, by bisection."""
    low, high = 0.0, 2.0 * degrees + 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, degrees) > level else (low, middle)
    return high


def bound_variation(tokens: int, num_experts: int, k: float) -> float:
    """The CV that an even router exceeds in 5 % of cases.

    Formula: expected CV × sqrt(critical chi-square / (E − 1)).
    """
    degrees = num_experts - 1
    floor = expected_variation(tokens, num_experts, k)
    return floor * math.sqrt(critical(degrees) / degrees) if degrees else math.nan


def tokens_needed(variation: float, num_experts: int, k: float) -> int | None:
    """From how many tokens on a load with this CV is more than chance (at 5 %). None: never, for a
    CV of 0 or K = E.

    Formula: critical chi-square / (E − 1) × (E − K) / (K CV²).
    """
    degrees = num_experts - 1
    if not variation > 0 or k >= num_experts:
        return None
    needed = critical(degrees) / degrees * (num_experts - k) / (k * variation**2)
    return math.ceil(needed) if needed < 1e15 else None


def expected_distance(
    load: NDArray[np.integer], other: NDArray[np.integer], tokens: int, others: int
) -> float:
    """The total variation distance that two samples from one and the same load would have. [E].

    Formula: ½ Σ over e of sqrt(2/π) sqrt(p_e (1 − p_e) (1/T + 1/T')) / K with p_e the share of all
    tokens that picked e: the mean size of a normal deviate of each expert's share.
    """
    if tokens <= 0 or others <= 0:
        return math.nan
    p = (load + other) / (tokens + others)
    k = float(p.sum())
    spread = np.sqrt(p * np.clip(1 - p, 0, 1) * (1 / tokens + 1 / others))
    return float(math.sqrt(2 / math.pi) * spread.sum() / (2 * k)) if k else math.nan


def _largest(tokens: int, num_experts: int, k: float) -> tuple[float, float]:
    """Mean and 95 % quantile of the largest of E independent binomial loads (T, K / E)."""
    if tokens <= 0 or k >= num_experts:
        return (float(max(tokens, 0)),) * 2
    p = k / num_experts
    mean, spread = tokens * p, math.sqrt(tokens * p * (1 - p))
    low = max(0, math.floor(mean - 8 * spread) - 1)
    high = min(tokens, math.ceil(mean + 12 * spread) + 12)
    n = np.arange(low, high + 1)
    chance = np.exp(
        _log_factorial(tokens) - _log_factorials(n) - _log_factorials(tokens - n)
        + n * math.log(p) + (tokens - n) * math.log1p(-p)
    )  # fmt: skip
    below = np.minimum(np.cumsum(chance), 1.0) ** num_experts  # P(max <= n)
    return float(low + (1 - below[:-1]).sum()), float(n[int(np.searchsorted(below, 1 - LEVEL))])


def _scaled(largest: float, tokens: int, num_experts: int, k: float) -> float:
    if tokens <= 0:
        return math.nan
    mean = tokens * k / num_experts
    stretch = math.sqrt(num_experts / (num_experts - 1)) if num_experts > 1 else 1.0
    return stretch * (largest - mean) / mean


def _log_factorial(n: int) -> float:
    return math.lgamma(n + 1)


def _log_factorials(n: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([math.lgamma(value + 1) for value in n.tolist()])
