"""A diagnosis in words: one sentence, then what it rests on. Pure text, for terminal and screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moescope.diagnosis.evidence import LEVELS
from moescope.diagnosis.verdict import Diagnosis
from moescope.variants import CATALOGUE, parse, title

NEAR_TIES = 1e-3  # logits of noise, above which flips at near ties are expected


def headline(made: Diagnosis) -> str:
    """The verdict in a sentence."""
    share = f"{100 * made.explained:.1f} % of {made.rows:,} decisions"
    if made.verdict == "trained":
        rest = "" if made.explained == 1.0 else "; the others are near ties or drift"
        return f"routed correctly: {share} are the trained router's{rest}"
    if made.verdict == "fault":
        return (
            f"routed wrong: {made.faults[0]} ({title(made.variants[0])}) explains {share}, the "
            f"trained router {100 * made.explained_by_trained:.1f} %"
        )
    nearest = made.runners_up[0].name if made.runners_up else "trained"
    return (
        f"none of these: no hypothesis or pair explains the trace; the best of them leaves "
        f"{100 * (1 - made.explained):.1f} % of {made.rows:,} decisions unexplained ({nearest})"
    )


def lines(made: Diagnosis, model: Any = None) -> Iterator[tuple[str, str]]:
    """(label, text) of what the verdict rests on."""
    if made.verdict == "fault":
        for name in _entries(made.variants[0]):
            variant = CATALOGUE[name]
            yield "what it does", variant.summary
            yield "fix", variant.fix
            cited = "; ".join(variant.links[:2])
            yield "seen in", f"{variant.evidence}{f' ({cited})' if cited else ''}"
    elif made.verdict == "none":
        yield "what to do", "see which layers agree: moescope diff, or compare hidden states"
    yield "Σ", _sums(made)
    if len(made.faults) > 1:
        yield "not told apart from", ", ".join(made.faults[1:])
    if made.indistinguishable:
        yield "would look the same", ", ".join(made.indistinguishable)
    if made.told_apart_by:
        yield "to tell them apart", f"record {made.told_apart_by}"
    if made.runners_up:
        yield (
            "runners-up",
            ", ".join(_runner(made, number) for number in range(len(made.runners_up))),
        )
    yield (
        "evidence",
        f"{LEVELS[made.level]} of {made.tokens:,} tokens in {len(made.layers)} routers",
    )
    yield "noise", _noise(made)


def _entries(expression: str) -> list[str]:
    items = [item for group in parse(expression).groups for item in group.items]
    return [item for item in items if isinstance(item, str)]


def _sums(made: Diagnosis) -> str:
    expected = "nothing" if made.score_sum_expected is None else f"{made.score_sum_expected:.3f}"
    if made.score_sum_seen is None:
        return f"{expected} expected; not recorded"
    return f"{made.score_sum_seen:.3f} seen, {expected} expected"


def _runner(made: Diagnosis, number: int) -> str:
    other = made.runners_up[number]
    return f"{other.name} ({100 * other.explained:.1f} %)"


def _noise(made: Diagnosis) -> str:
    if not made.noise:
        return "not known"
    first, last = made.noise[0], made.noise[-1]
    kind = "as bfloat16 or 8 bits leave it" if first > NEAR_TIES else "as float32 leaves it"
    return f"{first:.0e} logits in the first router, {last:.0e} in the last: {kind}"
