"""One token, layer by layer: rows to sort and filter, every expert's score, and the same as JSON.

Pure; drawn by `screens/token.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.spec import RouterSpec
from moescope.ui.history import Lane
from moescope.ui.routers import Decision, RouterTable, near_ties, sums_wrong


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One router's decision. None: not recorded."""

    router: int
    label: str
    picks: tuple[tuple[int, float | None], ...]  # (expert, weight), best first
    score_sum: float | None
    sum_wrong: bool
    entropy: float | None
    margin: float | None
    margin_unit: str  # "score" or "logit"
    runner_up: int  # -1: none
    near_tie: bool
    kept: int | None  # picks that the token before had too


def _or_last(value: float | None) -> float:
    return float("inf") if value is None else value


# name -> key, smallest first
SORTS: dict[str, Callable[[LayerRow], float]] = {
    "layer": lambda row: row.router,
    "margin": lambda row: _or_last(row.margin),
    "Σ": lambda row: _or_last(row.score_sum),
    "entropy": lambda row: -_or_last(row.entropy),
    "kept": lambda row: _or_last(row.kept),
}


def layer_rows(table: RouterTable, lane: Lane, row: int, decision: Decision) -> list[LayerRow]:
    """A row for every router, in order."""
    wrong, close = sums_wrong(table, decision), near_ties(decision)
    before = lane.expert_ids[row - 1] if row > 0 else None
    rows = []
    for router in range(table.count):
        ids = decision.expert_ids[router]
        weights = decision.weights[router] if decision.weights is not None else None
        picks = tuple(
            (int(expert), None if weights is None else _known(weights[rank]))
            for rank, expert in enumerate(ids)
            if expert >= 0
        )
        kept = None
        if before is not None:
            kept = len({expert for expert, _ in picks} & set(before[router].tolist()))
        rows.append(
            LayerRow(
                router=router,
                label=table.labels[router],
                picks=picks,
                score_sum=_known(decision.score_sum[router]),
                sum_wrong=bool(wrong[router]),
                entropy=_known(decision.entropy[router]),
                margin=_known(decision.margin[router]),
                margin_unit="score" if decision.in_scores[router] else "logit",
                near_tie=bool(close[router]),
                runner_up=int(decision.runner_up[router]),
                kept=kept,
            )
        )
    return rows


def arranged(rows: list[LayerRow], sort: str, ties_only: bool) -> list[LayerRow]:
    """Sorted by one of `SORTS`, and only near ties where asked."""
    return sorted((row for row in rows if row.near_tie or not ties_only), key=SORTS[sort])


def all_scores(logits: NDArray[np.float32], spec: RouterSpec) -> NDArray[np.float64]:
    """The scores of every expert of one router, as its scoring function gives them: [E]."""
    values = logits.astype(np.float64)
    kind = spec.policy.scoring_func
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-values))
    if kind == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0, values))
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - np.nanmax(values))
        return np.asarray(powers / np.nansum(powers), np.float64)


def as_json(
    table: RouterTable, lane: Lane, row: int, decision: Decision, variant: str, text: str
) -> str:
    """The token as one JSON object, in the names that exports use."""
    layers: list[dict[str, Any]] = []
    for found in layer_rows(table, lane, row, decision):
        layers.append(
            {
                "layer": table.layers[found.router],
                "expert_ids": [expert for expert, _ in found.picks],
                "weights": [None if w is None else round(w, 6) for _, w in found.picks],
                "score_sum": found.score_sum,
                "entropy": found.entropy,
                "margin": found.margin,
                "margin_unit": found.margin_unit,
                "runner_up": found.runner_up,
            }
        )
    return json.dumps(
        {
            "sequence": lane.sequence,
            "lane": lane.lane,
            "position": int(lane.position[row]),
            "token_id": int(lane.token_id[row]),
            "token": text,
            "variant": variant,
            "basis": decision.basis,
            "layers": layers,
        },
        ensure_ascii=True,
    )


def _known(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None
