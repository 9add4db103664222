"""Outputs of several calls as one, whichever interpreter made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import StepOutput


def merged(outs: Sequence[StepOutput]) -> StepOutput:
    """Outputs of single lanes as one; lanes may differ in K."""

    def joined(name: str) -> NDArray[Any] | None:
        parts = [getattr(out, name) for out in outs]
        if parts[0] is None:
            return None
        if name.endswith(("_ids", "weights", "scores")):
            K = max(part.shape[-1] for part in parts)
            fill = -1 if name.endswith("_ids") else 0
            parts = [
                np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, K - p.shape[-1])], constant_values=fill)
                for p in parts
            ]
        return np.concatenate(parts)

    invalid = [out.invalid_router for out in outs if out.invalid_router is not None]
    arrays = {f.name: joined(f.name) for f in fields(StepOutput) if f.name != "invalid_router"}
    return StepOutput(**arrays, invalid_router=min(invalid, default=None))  # type: ignore[arg-type]


def in_order(out: StepOutput, order: Sequence[int]) -> StepOutput:
    """Rows of an output, which stand in `order`, from the first to the last."""
    back = np.argsort(order)
    held = {f.name: getattr(out, f.name) for f in fields(StepOutput)}
    moved: dict[str, Any] = {
        name: rows[back] for name, rows in held.items() if isinstance(rows, np.ndarray)
    }
    return replace(out, **moved)
