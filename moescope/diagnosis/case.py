"""One trace beside one model: what a hypothesis predicts for its tokens, and how that fits.

Emulations of all sequences are put one after the other, N tokens in all, and compared with what was
recorded, router by router. What is tried, and in which order, is `search`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import counts
from moescope.diagnosis.decisions import Differences, differences
from moescope.diagnosis.emulate import OURS, Emulation, Engine, Forced, emulate_all
from moescope.diagnosis.evidence import Evidence
from moescope.diagnosis.hypotheses import Hypothesis
from moescope.diagnosis.likelihood import SMALLEST, Fit, fit
from moescope.diagnosis.weighed import weights_at
from moescope.engine.interpreter import Router
from moescope.kernels.reference import F64

HELD_BYTES = 256 << 20  # of emulated logits
FLOORS = {"float32": SMALLEST, "float16": 1e-4, "bfloat16": 1e-3}  # noise, in logits, at least
Data = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]  # ids, weights, sums


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """Emulations of all sequences, one after the other. N tokens in all."""

    hypothesis: Hypothesis
    routers: tuple[Router, ...]
    token_ids: NDArray[np.int64]  # [N]
    logits: NDArray[np.float32]  # [N, L, E]
    expert_ids: NDArray[np.int16]  # [N, L, K]
    weights: NDArray[np.float32]  # [N, L, K]
    score_sum: NDArray[np.float32]  # [N, L]


# By hypothesis, engine, whether it stops after the first router, and number of tokens.
Held = dict[tuple[str, Engine, bool, int], Predicted]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A hypothesis and how it fits: the first router only, or all of them."""

    hypothesis: Hypothesis
    fit: Fit

    @property
    def nats(self) -> float:
        return self.fit.total


@dataclass(frozen=True, eq=False)
class Case:
    """One trace beside one model. `held` keeps emulations, as far as memory is no matter."""

    model: Any
    evidence: Evidence
    ordered: bool = True
    engine: Engine = OURS
    held: Held = field(default_factory=dict)

    @cached_property
    def data(self) -> Data:
        """Everything recorded: ids [N, L, K], weights [N, L, K], sums [N, L]."""
        sequences = self.evidence.sequences
        width = max(one.expert_ids.shape[2] for one in sequences)
        ids = [_wide(one.expert_ids, width, -1) for one in sequences]
        weights = [one.weights for one in sequences]
        sums = [one.sums for one in sequences]
        return (
            np.concatenate(ids),
            np.concatenate([_wide(w, width, np.nan) for w in weights if w is not None])
            if all(w is not None for w in weights)
            else None,
            np.concatenate([s for s in sums if s is not None])
            if all(s is not None for s in sums)
            else None,
        )

    def predicted(self, hypothesis: Hypothesis, *, first_router: bool = False) -> Predicted:
        """Emulate, with the recorded experts forced; not where only their counts are known."""
        key = (hypothesis.expression, self.engine, first_router, self.evidence.tokens)
        if key in self.held:
            return self.held[key]
        sequences = self.evidence.sequences
        counted = self.evidence.counts is not None
        forced = [] if counted else [Forced(one.expert_ids) for one in sequences]
        runs = emulate_all(
            self.model,
            [one.token_ids.tolist() for one in sequences],
            hypothesis.expression,
            forced=forced,
            engine=self.engine,
            first_router=first_router,
        )
        made = _joined(hypothesis, runs)
        if (len(self.held) + 1) * made.logits.nbytes < HELD_BYTES:
            self.held[key] = made
        return made

    def compared(self, found: Predicted, data: Data | None = None) -> list[Differences]:
        """Router by router, what is predicted against what was recorded (or against `data`)."""
        ids, weights, sums = self.data if data is None else data
        return [
            self._one(found, index, ids[:, index], *(_of(part, index) for part in (weights, sums)))
            for index in range(len(found.routers))
        ]

    def _one(
        self,
        found: Predicted,
        index: int,
        ids: NDArray[Any],
        weights: NDArray[Any] | None,
        sums: NDArray[Any] | None,
    ) -> Differences:
        router = found.routers[index]
        logits = found.logits[:, index, : router.spec.E]
        made = differences(
            logits,
            router.spec,
            router.tensors,
            ids,
            weights,
            ordered=self.ordered,
            token_ids=found.token_ids,
        )
        if weights is None and sums is not None:
            given = weights_at(logits, ids, router.spec, router.tensors).sum(1)
            off = np.abs(sums - given) / np.maximum(np.abs(sums), 1e-30)
            off = np.where((ids >= 0).any(1), off, np.nan)[:, None]
            made = replace(made, relative=off, slopes=np.ones(off.shape))
        return made

    @property
    def floor(self) -> float:
        """The smallest noise that the engine's dtype allows."""
        return FLOORS[self.engine.dtype or "float32"]

    def fitted(self, found: Predicted, floor: Any = 0.0, data: Data | None = None) -> Fit:
        floor = np.maximum(floor, self.floor)
        if self.evidence.counts is not None:
            return counts.fit(found, self.evidence.counts if data is None else data[0], floor)
        return fit(self.compared(found, data), floor)

    def own(self, found: Predicted) -> Data:
        """What `found` predicts, as if it had been recorded like the trace."""
        if self.evidence.counts is not None:
            return counts.of(found, self.evidence.counts.shape[1]), None, None
        ids, weights, sums = self.data
        routers = found.expert_ids.shape[1]
        recorded = np.asarray((ids >= 0).any(2))[:, :routers]
        mine: NDArray[Any] = np.where(recorded[:, :, None], found.expert_ids, -1)
        return (
            mine,
            None if weights is None else np.where(mine >= 0, found.weights, np.nan),
            None if sums is None else np.where(recorded, found.score_sum, np.nan),
        )

    def apart(self, one: Predicted, other: Predicted, floor: Any) -> float:
        """How many nats a trace made by `one` would speak against `other`, with noise of the scale
        `floor` of every router. 0: they predict the same recorded fields."""
        data = self.own(one)
        return self.fitted(one, floor, data).total - self.fitted(other, floor, data).total


def _wide(part: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    return np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[2])), constant_values=fill)


def _of(part: NDArray[Any] | None, index: int) -> NDArray[Any] | None:
    return None if part is None else part[:, index]


def _joined(hypothesis: Hypothesis, runs: Sequence[Emulation]) -> Predicted:
    width = max(run.expert_ids.shape[2] for run in runs)

    def cat(name: str, fill: float | None = None) -> Any:
        parts = [getattr(run, name) for run in runs]
        return np.concatenate(parts if fill is None else [_wide(p, width, fill) for p in parts])

    return Predicted(
        hypothesis,
        runs[0].routers,
        cat("token_ids"),
        cat("logits"),
        cat("expert_ids", -1),
        cat("weights", 0.0),
        cat("score_sum"),
    )


def errors(case: Case, predicted: Predicted) -> F64:
    """[N, L]: the error of logits that would explain each row; NaN where nothing was recorded."""
    compared = case.compared(predicted)
    recorded = (case.data[0] >= 0).any(2)
    return np.where(recorded, np.stack([one.error() for one in compared], 1), np.nan)
