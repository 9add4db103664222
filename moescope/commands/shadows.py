"""What the shadow variants of a run would have picked, summed up while it streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Sums:
    decisions: int = 0
    same: int = 0  # with the same set of experts as the router in force
    other_counts: int = 0  # with more experts, or fewer
    common: int = 0  # picks of both
    fewer: int = 0  # picks of the one that picks fewer: all that could be common
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
            for ok, a, b in zip(decided, mine, others, strict=True):
                if ok:
                    sums.decisions += 1
                    sums.same += a == b
                    sums.other_counts += len(a) != len(b)
                    sums.common += len(a & b)
                    sums.fewer += min(len(a), len(b))
            sums.total += float(shadow["score_sum"][decided].sum())

    def document(self) -> dict[str, Any]:
        """Per variant: decisions, the share with the same experts, the share of picks in common
        (of those of the router that picks fewer), the mean score sum."""
        return {
            name: {
                "decisions": s.decisions,
                "same_experts": s.same / s.decisions if s.decisions else None,
                "common_picks": s.common / s.fewer if s.fewer else None,
                "mean_score_sum": s.total / s.decisions if s.decisions else None,
            }
            for name, s in self.sums.items()
        }

    def lines(self) -> list[str]:
        return [
            f"{name}: {_agreement(s)}, mean Σ {s.total / s.decisions:.3f}"
            for name, s in self.sums.items()
            if s.decisions
        ]


def _agreement(sums: _Sums) -> str:
    """Routers that pick other numbers of experts never pick the same set."""
    if sums.other_counts and sums.fewer:
        return f"{sums.common / sums.fewer:.1%} of the picks in common ({sums.decisions} decisions)"
    return f"the same experts in {sums.same / sums.decisions:.1%} of {sums.decisions} decisions"
