"""From next-token logits to a token: what the model expects, and which token is drawn.

Numpy, one row at a time, no state: the random number for a token depends on the seed and on its
position alone. So a rerun repeats exactly, a fork goes on as its source did, and lanes that share a
seed draw the same numbers, which leaves routing as the only difference between them.
V is the size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from moescope.engine.protocol import Sampling
from moescope.errors import MoescopeError
from moescope.kernels import native_ops
from moescope.trace.frames import ALTERNATIVES

BLOCK = 64  # values whose maximum stands for them in a first look: 20 times faster at V = 150,000
FIRST_LOOK = 1024  # candidates sorted before top-p asks for more: nearly always enough


def check(sampling: Sampling) -> None:
    """Raise `MoescopeError` where a field is out of range; the message names it."""
    ranges: tuple[tuple[str, float, float, str], ...] = (
        ("temperature", 0.0, 1e6, "0 (greedy) or more"),
        ("top_k", 0, math.inf, "0 (off) or more"),
        ("top_p", 0.0, 1.0, "0 to 1"),
        ("min_p", 0.0, 1.0, "0 to 1"),
        ("max_new_tokens", 0, math.inf, "0 or more"),
        ("seed", -math.inf, math.inf, "a number"),
    )
    for name, least, most, words in ranges:
        value = getattr(sampling, name)
        if not least <= value <= most:  # also true of NaN
            raise MoescopeError(f"{name}: expected {words}, found {value}")


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """What the model expects after a token: one row of logits and its log partition sum.

    `best` are the likeliest tokens in order with their logits in `values`, where they are known. A
    row of a prompt may not have been kept (`logits` None): of it `best` is known, and `next`, the
    id that follows there with its logit and its rank.
    """

    logits: NDArray[np.float32] | None  # [V]
    log_sum: float
    best: Sequence[int] = ()
    values: Sequence[float] = ()
    next: tuple[int, float, int] | None = None

    @staticmethod
    def of(logits: NDArray[np.float32]) -> Expectation | None:
        """None where the row is no distribution: NaN or +inf in it, or nothing finite."""
        top = float(logits.max(initial=-math.inf))
        if not math.isfinite(top):  # the maximum of a row with NaN is NaN
            return None
        return Expectation(logits, top + math.log(float(np.exp(logits - top).sum())))

    @property
    def row(self) -> NDArray[np.float32]:
        assert self.logits is not None, "a row that was not kept"
        return self.logits

    def logprob(self, token: int) -> float:
        if self.next is not None and self.next[0] == token:
            return self.next[1] - self.log_sum
        if token in self.best:
            return self.values[self.best.index(token)] - self.log_sum
        return float(self.row[token]) - self.log_sum

    def rank(self, token: int) -> int:
        """1 for the most likely token; equal logits rank by id."""
        if self.next is not None and self.next[0] == token:
            return self.next[2]
        if token in self.best:
            return 1 + self.best.index(token)
        value = self.row[token]
        above = int(np.count_nonzero(self.row > value))
        return 1 + above + int(np.count_nonzero(self.row[:token] == value))

    def likeliest(self, count: int = ALTERNATIVES) -> tuple[tuple[int, float], ...]:
        """The `count` most likely tokens as (id, log probability), best first."""
        ids, values = self.best[:count], self.values[:count]
        if len(ids) < count and self.logits is not None:
            order = largest(self.logits, count)
            ids, values = order.tolist(), self.logits[order].tolist()
        return tuple((i, value - self.log_sum) for i, value in zip(ids, values, strict=True))

    def likeliest_id(self) -> int:
        """The most likely token, the lower id of equal logits."""
        return self.best[0] if self.best else int(self.row.argmax())

    def logprobs(self) -> NDArray[np.float32]:
        return self.row - np.float32(self.log_sum)


def expectations(logits: NDArray[np.float32]) -> list[Expectation | None]:
    """`Expectation.of` every row [T, V], in one call of the C library where there is one."""
    answers = None
    if logits.flags.c_contiguous:
        rows, size = logits.shape
        answers = native_ops.expect(logits.ctypes.data, rows, size, ALTERNATIVES)
    if answers is None:
        return [Expectation.of(row) for row in logits]
    return expectations_of(logits, answers)


def expectations_of(
    rows: Iterable[NDArray[np.float32] | None], answers: native_ops.Answers
) -> list[Expectation | None]:
    """What C found of some rows; None where one is no distribution."""
    nexts: Iterable[tuple[int, float, int] | None] = repeat(None)
    if answers.next_ids is not None:
        told = (answers.next_ids, answers.told, answers.rank)
        nexts = zip(*(values.tolist() for values in told), strict=True)
    columns = (values.tolist() for values in (answers.log_sum, answers.ids, answers.values))
    return [
        None if math.isnan(log_sum) else Expectation(row, log_sum, ids, values, after)
        for row, log_sum, ids, values, after in zip(rows, *columns, nexts, strict=False)
    ]


def divergence(reference: Expectation, other: Expectation) -> float:
    """KL(reference || other) in nats, never below 0."""
    sums = reference.log_sum, other.log_sum
    fast = native_ops.divergence(reference.row, other.row, *sums)
    if fast is not None and not math.isnan(fast):
        return max(0.0, fast)
    p, q = reference.logprobs(), other.logprobs()
    # Where the reference gives nothing there is nothing to lose; where only the other gives
    # nothing the divergence is infinite.
    with np.errstate(invalid="ignore"):
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0)
    return max(0.0, float(terms.sum(dtype=np.float64)))


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, descending, equal values by index."""
    count = min(count, len(values))
    if count <= 0:
        return np.empty(0, np.int64)
    if count == 1:
        return np.asarray([values.argmax()])
    blocks = len(values) // BLOCK
    if count <= blocks // 2:
        # `count` blocks reach the bound, so at least as many values do, and few more.
        maxima = values[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        candidates = np.flatnonzero(values >= _at_rank(maxima, count))
    else:
        candidates = np.arange(len(values))
    among = values[candidates]
    kept = among >= _at_rank(among, count)
    candidates, among = candidates[kept], among[kept]
    chosen: NDArray[np.int64] = candidates[np.argsort(-among, kind="stable")[:count]]
    return chosen


def _at_rank(values: NDArray[np.float32], rank: int) -> np.float32:
    """The value of rank `rank`, 1 being the largest."""
    value: np.float32 = np.partition(values, len(values) - rank)[len(values) - rank]
    return value


@lru_cache(maxsize=64)
def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that decides the token at `position`."""
    key = np.array([seed & (2**64 - 1), (seed >> 64) & (2**64 - 1)], dtype=np.uint64)
    bits = int(np.random.Philox(key=key, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def choose(expected: Expectation, sampling: Sampling, position: int) -> int:
    """Draw the token at `position`. Greedy takes the lower id of equal logits.

    Filters act in the order transformers applies them: temperature, top-k, top-p, min-p. What is
    left is drawn by the inverse of its distribution function in the order of ids, so that a small
    change of the logits seldom changes the token.
    """
    if sampling.temperature == 0.0:
        return expected.likeliest_id()
    ids, weights = candidates(expected, sampling)
    steps = np.cumsum(weights)
    drawn = int(np.searchsorted(steps, uniform(sampling.seed, position) * steps[-1], side="right"))
    # Tokens of weight 0 are flat steps, never hit; rounding at the very end is the one exception.
    return int(ids[min(drawn, int(np.searchsorted(steps, steps[-1])))])


def candidates(
    expected: Expectation, sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What may be drawn: ids in ascending order and their weights (not normalised)."""
    logits = expected.row
    below = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # a tiny temperature makes them -inf, which is meant
        weights = np.exp(below / sampling.temperature)
    kept = np.arange(len(weights))
    if 0 < sampling.top_k < len(weights):
        kept = np.sort(largest(logits, sampling.top_k))
    if sampling.top_p < 1.0:
        kept = np.sort(_nucleus(weights, kept, sampling.top_p))
    if sampling.min_p > 0.0:
        kept = kept[weights[kept] >= sampling.min_p * weights[kept].max()]
    return kept, weights[kept]


def _nucleus(
    weights: NDArray[np.float64], kept: NDArray[np.int64], top_p: float
) -> NDArray[np.int64]:
    """The fewest of `kept` that hold `top_p` of its weight, at least one."""
    among = weights[kept]
    goal = top_p * among.sum()
    count = FIRST_LOOK
    while True:
        order = largest(among.astype(np.float32), count)
        # A token stays while those before it have not reached the goal.
        before = np.cumsum(among[order]) - among[order]
        if count >= len(among) or before[-1] >= goal:
            return kept[order[: max(1, int(np.count_nonzero(before < goal)))]]
        count *= 8
