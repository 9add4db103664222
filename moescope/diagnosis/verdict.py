"""What the search found, decided: routed correctly, a named fault, or none of these.

A fault is named where the trace speaks for it against the trained router by more than `MARGIN`
nats, and where it explains the rows: with errors of logits that an engine's precision can make. Two
hypotheses share a class only if emulating them predicts the same recorded fields on these tokens,
within the noise of this trace.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import counts, hypotheses, search
from moescope.diagnosis.case import Candidate, Case, Data, Held, Predicted, errors
from moescope.diagnosis.emulate import OURS
from moescope.diagnosis.evidence import Evidence, Level
from moescope.diagnosis.hypotheses import TRAINED, Hypothesis
from moescope.diagnosis.likelihood import SMALLEST
from moescope.diagnosis.search import Watch

MARGIN = 8.0  # nats: e^8 to 1, of some sixty hypotheses
ALIKE = 3 * MARGIN  # nats between two predictions that a trace may fail to tell apart
NOISE = 8.0  # scales of noise within which a row is explained
LEAST = 2e-5  # logits: what float32 arithmetic in another order may differ by
EXPLAINED = 0.9  # of the first router's rows
EXPLAINED_ALL = 0.75  # of all rows
EXPLAINED_COUNTS = 0.95
RUNNERS_UP = 3

Kind = Literal["trained", "fault", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class RunnerUp:
    """A hypothesis that did not win, and by how many nats."""

    name: str
    behind: float
    explained: float


@dataclass(frozen=True, slots=True, eq=False)
class Diagnosis:
    """The verdict on one trace. Shares are of recorded rows: one token in one router."""

    verdict: Kind
    faults: tuple[str, ...]  # the equivalence class, best first
    explained: float
    explained_by_trained: float
    score_sum_expected: float | None
    score_sum_seen: float | None
    indistinguishable: tuple[str, ...]  # faults that predict what the trained router does, here
    variants: tuple[str, ...] = ()  # the expressions of `faults`
    runners_up: tuple[RunnerUp, ...] = ()
    told_apart_by: str = ""  # what recording would tell the class apart
    level: Level = "weights"
    ordered: bool = True
    rows: int = 0
    tokens: int = 0
    noise: tuple[float, ...] = ()  # of every router, in logits
    nats: float = 0.0  # by which the trace speaks for the verdict against the trained router
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "faults": list(self.faults),
            "explained": self.explained,
            "explained_by_trained": self.explained_by_trained,
            "score_sum_expected": self.score_sum_expected,
            "score_sum_seen": self.score_sum_seen,
            "indistinguishable": list(self.indistinguishable),
        }


def diagnose(
    model: Any,
    evidence: Evidence,
    *,
    watch: Watch = lambda what, at, of: None,
    held: Held | None = None,
) -> Diagnosis:
    """Name the router that made `evidence`. `model` is a `LoadedModel`; `watch` is told which
    hypothesis is tried. Cost: hypotheses × tokens, most of them on the first router only. `held`
    keeps emulations from one call to the next, of the same experts at another level of evidence."""
    tried = [TRAINED, *hypotheses.singles(model.interpreter.spec)]
    case, firsts = search.settle(model, evidence, tried, {} if held is None else held)
    ranked = search.through_the_model(case, search.survivors(firsts), watch)
    if ranked[0].hypothesis is not TRAINED and (fairer := search.fairer(case, ranked[0])):
        case = fairer
        kept = {c.hypothesis for c in ranked}
        ranked = search.through_the_model(case, [h for h in tried if h in kept], watch)
    trained = case.predicted(TRAINED)
    judge = _Judge(case, trained, ranked, tried)
    if not judge.holds(ranked[0]):
        order = sorted(firsts, key=lambda c: -c.nats)
        more = search.best_pairs(case, _for_pairs(ranked, order), watch)
        ranked = search.ranked([*ranked, *more])
        judge = _Judge(case, trained, ranked, tried)
    return judge.decided()


def _for_pairs(ranked: Sequence[Candidate], firsts: Sequence[Candidate]) -> list[Candidate]:
    """The best singles: through the model first, then on the first router; not the trained one."""
    found: dict[Hypothesis, Candidate] = {}
    for candidate in (*ranked, *firsts):
        if candidate.hypothesis is not TRAINED:
            found.setdefault(candidate.hypothesis, candidate)
    return list(found.values())


class _Judge:
    """The candidates of one case, best first, and what they explain."""

    def __init__(
        self,
        case: Case,
        trained: Predicted,
        ranked: Sequence[Candidate],
        tried: Sequence[Hypothesis],
    ) -> None:
        self.case, self.trained, self.ranked, self.tried = case, trained, list(ranked), tried
        self.best = self.ranked[0]
        self.as_trained = next(c for c in self.ranked if c.hypothesis is TRAINED)
        self.tolerance = self._tolerance()
        self._shares: dict[Hypothesis, tuple[float, float]] = {}

    def _tolerance(self) -> NDArray[np.float64]:
        """[L] in logits: the error within which a row counts as explained."""
        most = search.MOST * search.spread(self.trained.logits)
        tolerance: NDArray[np.float64] = np.maximum(
            np.minimum(NOISE * self.best.fit.scale, most), LEAST
        )
        return tolerance

    def predicted(self, candidate: Candidate) -> Predicted:
        return self.case.predicted(candidate.hypothesis)

    def explains(self, candidate: Candidate) -> tuple[float, float]:
        """The shares of rows of the first router, and of all, that it explains."""
        held = self._shares.get(candidate.hypothesis)
        if held is None:
            held = self._share(self.predicted(candidate))
            self._shares[candidate.hypothesis] = held
        return held

    def _share(self, predicted: Predicted) -> tuple[float, float]:
        seen = self.case.evidence.counts
        if seen is not None:
            shares = counts.overlap(counts.of(predicted, seen.shape[1]), seen)
            return float(shares[0]), float(shares.mean())
        off = errors(self.case, predicted)
        good = np.where(np.isnan(off), np.nan, off <= self.tolerance)
        recorded = ~np.isnan(good)
        return _mean(good[:, 0][recorded[:, 0]]), _mean(good[recorded])

    def holds(self, candidate: Candidate) -> bool:
        """Whether an engine's precision is enough to explain what a candidate does not predict."""
        first, every = self.explains(candidate)
        if self.case.evidence.counts is not None:
            return min(first, every) >= EXPLAINED_COUNTS
        return first >= EXPLAINED and every >= EXPLAINED_ALL

    # --- the decision -----------------------------------------------------------------------------

    def decided(self) -> Diagnosis:
        best, trained = self.best, self.as_trained
        if self._to_the_last_digit():
            return self._made("trained", trained)
        ahead = best.nats - trained.nats
        if self.holds(trained) and ahead <= MARGIN:
            return self._made("trained", trained)
        if best is not trained and ahead > MARGIN and self.holds(best):
            return self._made("fault", best)
        if self.holds(trained):
            return self._made("trained", trained)
        return self._made("none", best)

    def _to_the_last_digit(self) -> bool:
        """Whether the trained router, in float32, leaves nothing to explain: what speaks for
        another one then is below all that was recorded."""
        if self.case.engine.dtype is not None or self.case.evidence.counts is not None:
            return False
        compared = self.case.compared(self.trained)
        held = not any((one.gaps < 0).any() for one in compared)
        return held and all((one.error() <= LEAST).all() for one in compared)

    def _made(self, verdict: Kind, chosen: Candidate) -> Diagnosis:
        alike = [] if verdict == "none" else self._alike(chosen)
        named = [chosen, *alike] if verdict == "fault" else []
        data = self.case.data
        expected, seen = _sums(self.trained, data)
        others = [c for c in self.ranked if c not in (chosen, *alike)]
        level = self.case.evidence.level
        return Diagnosis(
            verdict=verdict,
            faults=_names(named),
            explained=self.explains(chosen)[1],
            explained_by_trained=self.explains(self.as_trained)[1],
            score_sum_expected=expected,
            score_sum_seen=seen,
            indistinguishable=_names(alike) if verdict == "trained" else (),
            variants=tuple(c.hypothesis.expression for c in named),
            runners_up=tuple(self._runner_up(c, chosen) for c in others[:RUNNERS_UP]),
            told_apart_by=self._told_apart(chosen, alike),
            level="sets" if level == "order" and not self.case.ordered else level,
            ordered=self.case.ordered,
            rows=int((data[0] >= 0).any(2).sum()),
            tokens=self.case.evidence.tokens,
            noise=tuple(float(scale) for scale in chosen.fit.scale),
            nats=chosen.nats - self.as_trained.nats,
            layers=tuple(router.layer for router in self.trained.routers),
            notes=self.case.evidence.notes,
        )

    def _alike(self, chosen: Candidate) -> list[Candidate]:
        """Those that this trace cannot tell from `chosen`, checked by emulating both."""
        mine = self.predicted(chosen)
        behind = search.KEPT if chosen is self.as_trained else MARGIN  # of a fault: told apart
        close = [
            c
            for c in self.ranked
            if c is not chosen
            and (c.hypothesis is not TRAINED)
            and len(c.hypothesis.names) <= max(1, len(chosen.hypothesis.names))
            and chosen.nats - c.nats <= behind
        ]
        floor = chosen.fit.scale
        found = [c for c in close if self.case.apart(mine, self.predicted(c), floor) <= ALIKE]
        if chosen is self.as_trained:
            found += self._nothing_new({c.hypothesis for c in found})
        return found

    def _nothing_new(self, known: Container[Hypothesis]) -> list[Candidate]:
        """Faults that are no fault in an engine of this dtype: rounding what is rounded anyway.
        Checked by emulating it on the first router, in that dtype throughout."""
        engine = replace(self.case.engine, combine_only=False)
        case = replace(self.case, engine=engine)
        if engine.dtype is None:
            return []
        trained = case.predicted(TRAINED, first_router=True)
        floor = self.as_trained.fit.scale[: len(trained.routers)]
        found = []
        for hypothesis in self.tried:
            if hypothesis in known or hypothesis is TRAINED:
                continue
            if hypothesis.rounds_in_vain(trained.routers):
                other = case.predicted(hypothesis, first_router=True)
                if case.apart(trained, other, floor) <= MARGIN:
                    found.append(Candidate(hypothesis, self.as_trained.fit))
        return found

    def _runner_up(self, candidate: Candidate, chosen: Candidate) -> RunnerUp:
        name = candidate.hypothesis.expression
        return RunnerUp(name, chosen.nats - candidate.nats, self.explains(candidate)[1])

    def _told_apart(self, chosen: Candidate, alike: Sequence[Candidate]) -> str:
        """What to record, where a class holds more than one; found by emulating the members."""
        if not alike:
            return ""
        members, mine = [self.predicted(c) for c in alike], self.predicted(chosen)
        rich = replace(self.case, ordered=True, evidence=replace(self.case.evidence, counts=None))
        for words, weighed, floor in self._richer(chosen.fit.scale):
            data = (mine.expert_ids, mine.weights if weighed else None, None)
            rich = replace(rich, engine=OURS if floor is SMALLEST else self.case.engine)
            whole = rich.fitted(mine, floor, data).total
            if all(whole - rich.fitted(other, floor, data).total > MARGIN for other in members):
                return words
        return ""

    def _richer(self, noise: Any) -> list[tuple[str, bool, Any]]:
        """What a recording may hold beyond this one: in words, with weights or not, its noise."""
        level = self.case.evidence.level
        found: list[tuple[str, bool, Any]] = []
        if level == "counts" or not self.case.ordered:
            found.append(("the experts of every token, in rank order", False, noise))
        if level != "weights":
            found.append(("the combine weights", True, noise))
        found.append(("weights, of an engine that computes in float32", True, SMALLEST))
        return found


def _names(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The names of faults, each once; of a pair, both."""
    return tuple(dict.fromkeys(" + ".join(c.hypothesis.faults) for c in candidates))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 1.0


def _sums(trained: Predicted, data: Data) -> tuple[float | None, float | None]:
    """The mean score sums: what the trained router gives, and what was recorded."""
    ids, weights, sums = data
    recorded = (ids >= 0).any(2)
    if not recorded.any():
        recorded = np.ones(trained.score_sum.shape, bool)
    expected = trained.score_sum[recorded]
    seen = sums if weights is None else np.nansum(weights, axis=2)
    finite = expected[np.isfinite(expected)]
    mean = float(finite.mean()) if len(finite) else None
    return mean, None if seen is None else float(np.nanmean(seen[recorded]))
