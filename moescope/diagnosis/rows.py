"""Tokens of a lane as columns, and how each router's decisions agree with those of another lane.

Pure. Letters: T tokens, L routers, A and B picks of the two lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.frames import Frame

# Sums over tokens that an agreement is made of; each counts L routers.
SUMS = (
    *("tokens", "same_set", "same_order", "overlap", "jaccard", "same_top1"),
    *("weight_tokens", "weight_difference", "score_sum_a", "score_sum_b"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """T tokens of one lane. NaN stands for what was not recorded; `top1` 1, 0 or NaN."""

    position: NDArray[Any]  # [T]
    token_id: NDArray[Any]  # [T]
    expert_ids: NDArray[Any]  # [T, L, K]
    weights: NDArray[Any] | None  # [T, L, K]
    score_sum: NDArray[Any]  # [T, L]
    margin: NDArray[Any]  # [T, L]
    kl: NDArray[Any]  # [T] against the first lane
    top1: NDArray[Any]  # [T] the same most likely next token as the first lane

    def __getitem__(self, places: Any) -> Rows:
        """Some of the tokens."""
        return Rows(
            self.position[places],
            self.token_id[places],
            self.expert_ids[places],
            None if self.weights is None else self.weights[places],
            self.score_sum[places],
            self.margin[places],
            self.kl[places],
            self.top1[places],
        )


def of_frame(frame: Frame) -> Rows:
    """One token as rows."""
    unknown = float("nan")
    return Rows(
        position=np.array([frame.position]),
        token_id=np.array([frame.token_id]),
        expert_ids=frame.expert_ids[None],
        weights=None if frame.weights is None else frame.weights[None],
        score_sum=frame.score_sum[None],
        margin=frame.margin[None],
        kl=np.array([unknown if frame.kl is None else frame.kl]),
        top1=np.array([unknown if frame.top1_agrees is None else float(frame.top1_agrees)]),
    )


def decisions(a: Rows, b: Rows) -> dict[str, NDArray[np.float64]]:
    """How each router's decision in `a` agrees with that in `b`: the names of SUMS, each [T, L].

    A router that decided nothing valid in either counts nowhere, and so does a weight that was not
    recorded in one of them.
    """
    ids_a, ids_b = a.expert_ids, b.expert_ids
    used_a, used_b = ids_a >= 0, ids_b >= 0
    match = (ids_a[..., :, None] == ids_b[..., None, :]) & used_a[..., :, None]  # [T, L, A, B]
    count_a, count_b = used_a.sum(2), used_b.sum(2)
    shared = match.sum((2, 3))
    larger = np.maximum(count_a, count_b)
    union = np.maximum(count_a + count_b - shared, 1)
    valid = (count_a > 0) & (count_b > 0)
    width = min(ids_a.shape[2], ids_b.shape[2])
    in_order = (ids_a[..., :width] == ids_b[..., :width]).all(2) & (count_a == count_b)
    found = {
        "tokens": valid,
        "same_set": valid & (shared == larger),
        "same_order": valid & in_order,
        "overlap": np.where(valid, shared / np.maximum(larger, 1), 0.0),
        "jaccard": np.where(valid, shared / union, 0.0),
        "same_top1": valid & (ids_a[..., 0] == ids_b[..., 0]),
        "score_sum_a": np.where(valid, a.score_sum, 0.0),
        "score_sum_b": np.where(valid, b.score_sum, 0.0),
        "weight_tokens": np.zeros(valid.shape),
        "weight_difference": np.zeros(valid.shape),
    }
    if a.weights is not None and b.weights is not None:
        of_b = np.where(match, b.weights[..., None, :], 0.0).sum(3)  # what B gave A's experts
        distance = np.where(used_a, np.abs(a.weights - of_b), 0.0).sum(2)
        distance += np.where(used_b & ~match.any(2), np.abs(b.weights), 0.0).sum(2)
        known = valid & np.isfinite(distance)
        found["weight_tokens"] = known.astype(float)
        found["weight_difference"] = np.where(known, distance / union, 0.0)
    return {name: np.asarray(value, np.float64) for name, value in found.items()}
