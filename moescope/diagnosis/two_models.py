"""Two checkpoints side by side: an original and its quantised copy, a base and one tuned of it.

Both run in one session (`engine/beside.py`), lane A the first model and lane B the second, so they
are compared as lanes are. Their gates differ: why a flip came, and which rows of the gate turned
it, is what the session finds by crossing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moescope.diagnosis.compare_run import CompareRun, run_compare
from moescope.engine.beside import beside, correspond, outline
from moescope.engine.protocol import Generate
from moescope.safety import single_line


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: a `LoadedModel`, its tokenizer (None: there is none), the variant it runs."""

    model: Any
    tokenizer: Any
    variant: str = "trained"

    @property
    def name(self) -> str:
        return single_line(str(self.model.facts.get("name", "")), 80)


def sides_of(
    model: Any, tokenizer: Any, variants: Sequence[str], models: Sequence[int]
) -> list[Side]:
    """What each lane of a comparison ran: of one model, or of two beside each other."""
    both = [model.first, model.second] if hasattr(model, "second") else [model]
    return [
        Side(both[which], tokenizer, variant)
        for variant, which in zip(variants, models, strict=True)
    ]


def check_pair(a: Side, b: Side) -> None:
    """Refuse models whose routers or vocabularies do not correspond."""
    if a.model is not b.model:
        correspond(outline(a.model), outline(b.model))


def run_two(a: Side, b: Side, request: Generate, **options: Any) -> CompareRun:
    """Run `request` in both and compare them; `options` are those of `run_compare`."""
    return run_compare(
        beside(a.model, b.model),
        a.tokenizer if a.tokenizer is not None else b.tokenizer,
        (a.variant, b.variant),
        request,
        models=(0, 1),
        **options,
    )
