"""What the shadow variants of a run would have picked, summed up while it streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Sums:
    decisions: int = 0
    same: int = 0  # with the same set of experts as the router in force
    total: float = 0.0  # of the score sums


@dataclass(slots=True)
class Tally:
    """Frames in, one line a shadow variant out."""

    sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, frame: Any) -> None:
        if not frame.shadow:
            return
        import numpy as np

        mine = [set(row[row >= 0]) for row in frame.expert_ids]
        for name, shadow in frame.shadow.items():
            sums = self.sums.setdefault(name, _Sums())
            decided = np.isfinite(shadow["score_sum"])
            others = [set(row[row >= 0]) for row in shadow["expert_ids"]]
            pairs = zip(decided, mine, others, strict=True)
            sums.decisions += int(decided.sum())
            sums.same += sum(bool(ok) and a == b for ok, a, b in pairs)
            sums.total += float(shadow["score_sum"][decided].sum())

    def document(self) -> dict[str, Any]:
        """Per variant: decisions, the share with the same experts, the mean score sum."""
        return {
            name: {
                "decisions": s.decisions,
                "same_experts": s.same / s.decisions if s.decisions else None,
                "mean_score_sum": s.total / s.decisions if s.decisions else None,
            }
            for name, s in self.sums.items()
        }

    def lines(self) -> list[str]:
        return [
            f"{name}: the same experts in {s.same / s.decisions:.1%} of {s.decisions} decisions, "
            f"mean Σ {s.total / s.decisions:.3f}"
            for name, s in self.sums.items()
            if s.decisions
        ]
