"""MiniMax-M2."""

from __future__ import annotations

from typing import Any

from tests.families.kit import Case

TINY: dict[str, dict[str, Any]] = {
    "minimax_m2": {"head_dim": 24, "num_local_experts": 8},
}
CASES = (
    Case("minimax_m2", "released", 0, {"rotary_dim": 12}),
    Case(
        "minimax_m2",
        "whole",
        0,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
    ),
)
