"""Policies as columns of MLX arrays, and which of their steps need not be traced.

A policy is data: a row may change and nothing is traced again. What a whole table of rows does not
ask for may all the same be left out of a trace, because each operator costs microseconds on a CPU;
then a row that does ask for it needs another trace.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.kernels.policy_rows import COLUMN, WIDTH

ALL = frozenset(COLUMN)
# What a column holds where its step can be left out; for those not named, nothing is left out.
_IDLE: dict[str, float] = {
    "logits_dtype": 0,
    "router_logit_scale": 1,
    "router_logit_softcapping": 0,
    "scoring_func": 0,
    "score_order": 0,
    "score_passes": 1,
    "score_dtype": 0,
    "correction_bias": 0,
    "n_group": 1,
    "tie_break": 0,
    "weights_from": 0,
    "norm_p": 1,
    "norm_eps_mode": 0,
    "per_expert_scale": 0,
    "weight_scale": 1,
    "combine_dtype": 0,
    "hash_table": 0,
}


def fields_of(rows: NDArray[np.floating], E: int) -> frozenset[str]:
    """The columns of rows [..., 32] whose steps `route_plain` may not leave out: a static word for
    what is traced, while the rows themselves stay data."""
    rows = np.asarray(rows).reshape(-1, WIDTH)
    found = {name for name, idle in _IDLE.items() if (rows[:, COLUMN[name]] != idle).any()}
    if (rows[:, COLUMN["weightless_from"]] < E).any():
        found.add("weightless_from")
    return frozenset(found)


class Row:
    """The policies of R rows: a column is an array [R, 1] float32; `has` says whether a step may be
    left out of what is traced."""

    def __init__(self, rows: mx.array, fields: frozenset[str]) -> None:
        self._columns: Any = mx.split(rows.astype(mx.float32), WIDTH, axis=-1)
        self._fields = fields

    def has(self, name: str) -> bool:
        return name in self._fields

    def __getattr__(self, name: str) -> mx.array:
        column: mx.array = self._columns[COLUMN[name]]
        return column

    def after(self) -> mx.array:
        return self.score_order == 1

    def sparse(self) -> mx.array:
        return self.scoring_func == 3
