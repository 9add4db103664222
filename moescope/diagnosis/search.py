"""The search: which hypotheses a trace leaves standing, and how far each is from the others.

Singles first, on the first router, where the input is right whatever follows; the survivors through
the whole model, with the recorded experts forced, so that every layer is judged on the state it
must have had. Pairs only where no single explains the trace. Everything is counted in nats
(`likelihood`); what they mean is decided in `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import counts, hypotheses
from moescope.diagnosis.decisions import Differences, differences
from moescope.diagnosis.emulate import OURS, Emulation, Engine, Forced, emulate_all, spec_in
from moescope.diagnosis.evidence import Evidence
from moescope.diagnosis.hypotheses import TRAINED, Hypothesis
from moescope.diagnosis.likelihood import LEVEL, SMALLEST, Fit, fit
from moescope.diagnosis.weighed import last_cast, weights_at
from moescope.engine.interpreter import Router
from moescope.kernels.reference import F64
from moescope.kernels.spec import RouterSpec
from moescope.variants import apply

FEW = 64  # tokens of the first look, and of pairs
BEST = 10  # singles that pairs are made of
HELD_BYTES = 256 << 20  # of emulated logits
NEAR = 1000.0  # nats behind the best that another dtype of the engine might make up for
KEPT = 30.0  # nats behind the best after which nobody comes back
# the least and the most noise, in logits, for which a dtype of the engine is considered
NOISE_OF = {"float32": (0.0, 10.0), "float16": (1e-4, 5e-3), "bfloat16": (1e-4, 10.0)}
MOST = 0.15  # of the spread of a row's logits: no engine is that far off
FAIR = 8.0  # nats that the trained router may be behind and still decide what is not told
FLOORS = {"float32": SMALLEST, "float16": 1e-4, "bfloat16": 1e-3}  # noise, in logits, at least
Data = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]  # ids, weights, sums
Watch = Callable[[str, int, int], None]  # what is done, of how many


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


# --- the first router -----------------------------------------------------------------------------


def first_router(case: Case, tried: Sequence[Hypothesis]) -> list[Candidate]:
    """Nats of each hypothesis on the first router alone, the trained one's first. Only those that
    change what its logits are made of are run."""
    bare = replace(case, engine=OURS) if case.engine.combine_only else case
    decoder = spec_in(case.model, case.engine) or case.model.interpreter.spec
    layer, _, spec = decoder.routers()[0]
    fits: dict[tuple[str, RouterSpec], Fit] = {}  # what is around a router changes nothing here
    found = []
    for hypothesis in (TRAINED, *(h for h in tried if h is not TRAINED)):
        runs = hypothesis if hypothesis.changes_logits(spec, layer) else TRAINED
        edited = apply(hypothesis.edits, spec, layer)
        if (runs.expression, edited) not in fits:
            predicted = _first(bare.predicted(runs, first_router=True))
            router = replace(predicted.routers[0], spec=edited)
            fits[runs.expression, edited] = case.fitted(replace(predicted, routers=(router,)))
        found.append(Candidate(hypothesis, fits[runs.expression, edited]))
    return found


def _first(predicted: Predicted) -> Predicted:
    """A layer may hold more than one router."""
    return replace(predicted, routers=predicted.routers[:1], logits=predicted.logits[:, :1])


def settle(
    model: Any, evidence: Evidence, tried: Sequence[Hypothesis], held: Held
) -> tuple[Case, list[Candidate]]:
    """The case, with what no field tells: whether ids are in rank order, and what the engine
    computed in. Of what leaves no more noise than an engine makes, it is what lets the trained
    router fit as well as anything fits; else what the best hypothesis fits best with."""
    orders = (True, False) if evidence.ordered is None else (evidence.ordered,)
    settings: list[Setting] = []
    ours = Case(model, evidence, held=held)
    logits = ours.predicted(TRAINED, first_router=True).logits[:, :1]
    for engine in engines(model, evidence.dtype):
        noise = max(settings, key=lambda s: s.best).noise if settings else 1.0
        if settings and not _may_be(engine, noise):
            continue
        if len(settings) == len(orders):  # another dtype changes much less than another router
            near = {h for setting in settings for h in _near(setting)}
            tried = [h for h in tried if h in near]
        for ordered in orders:
            case = replace(ours, ordered=ordered, engine=engine)
            settings.append(Setting.of(case, first_router(case, tried)))
    likely = [s for s in settings if s.noise <= MOST * float(spread(logits)[0])] or settings
    top = max(setting.best for setting in likely)
    fair = [s for s in likely if s.trained >= top - FAIR]
    chosen = max(fair, key=lambda s: s.trained) if fair else max(likely, key=lambda s: s.best)
    return chosen.case, chosen.found


def _near(setting: Setting) -> list[Hypothesis]:
    """What another dtype might make up for. That weights are cast tells much of any that are, right
    or wrong, so those that cast are compared among themselves."""
    layer, _, spec = setting.case.model.interpreter.spec.routers()[0]
    casting: dict[str, list[Candidate]] = {}
    for candidate in setting.found:
        edited = apply(candidate.hypothesis.edits, spec, layer)
        casting.setdefault(last_cast(edited)[0], []).append(candidate)
    return [h for found in casting.values() for h in survivors(found, NEAR)]


def spread(logits: NDArray[Any]) -> F64:
    """[L]: how far the logits [N, L, E] of a row lie apart: the median standard deviation."""
    wide = logits.astype(np.float64)
    with np.errstate(all="ignore"):
        deviations = np.nanstd(np.where(np.isfinite(wide), wide, np.nan), axis=2)
        found: F64 = np.nan_to_num(np.nanmedian(deviations, axis=0), nan=1.0)
    return found


def fairer(case: Case, best: Candidate) -> Case | None:
    """The case with another dtype of the engine, in which the trained router fits all routers as
    well as `best` does in this one; None where there is none."""
    noise = float(best.fit.scale[0])
    found = []
    for engine in engines(case.model, case.evidence.dtype):
        if engine != case.engine and _may_be(engine, noise):
            other = replace(case, engine=engine)
            found.append((other.fitted(other.predicted(TRAINED)).total, other))
    top = max(found, key=lambda pair: pair[0], default=(-math.inf, None))
    return top[1] if top[0] >= best.nats - FAIR else None


def _may_be(engine: Engine, noise: float) -> bool:
    """Whether noise of this scale is what the dtype of an engine leaves."""
    least, most = NOISE_OF[engine.dtype or "float32"]
    return least <= noise <= most


def engines(model: Any, told: str | None) -> list[Engine]:
    """What an engine may have computed in, ours first; of those that mean the same for this model,
    one."""
    ours = model.interpreter.dtype
    named = [told] if told else ["bfloat16", "float16"]
    others = [dtype for dtype in named if dtype != ours]
    made = [Engine(dtype, only) for dtype in others for only in (True, False)]
    found: dict[Any, Engine] = {}
    for engine in made if told and others else [OURS, *made]:
        spec = spec_in(model, engine) or model.interpreter.spec
        found.setdefault((tuple(router for _, _, router in spec.routers()), engine.dtype), engine)
    return list(found.values())


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A case that is tried, in nats: what the best hypothesis and what the trained one reach."""

    case: Case
    found: list[Candidate]
    best: float
    trained: float
    noise: float

    @classmethod
    def of(cls, case: Case, found: list[Candidate]) -> Setting:
        chance = 0.0 if case.ordered else _chance_of_orders(case)
        best = max(found, key=lambda candidate: candidate.nats)
        trained = next(c for c in found if c.hypothesis is TRAINED)
        noise = float(best.fit.scale[0])
        return cls(case, found, best.nats + chance, trained.nats + chance, noise)


def _chance_of_orders(case: Case) -> float:
    """Nats of a random order, which rank order must beat."""
    picked = (case.data[0][:, 0] >= 0).sum(1)
    return -float(sum(math.lgamma(int(count) + 1) for count in picked))


# --- the whole model ------------------------------------------------------------------------------


def survivors(found: Sequence[Candidate], margin: float = KEPT) -> list[Hypothesis]:
    best = max(candidate.nats for candidate in found)
    return [c.hypothesis for c in found if c.nats >= best - margin]


def through_the_model(
    case: Case, tried: Sequence[Hypothesis], watch: Watch = lambda what, at, of: None
) -> list[Candidate]:
    """Fit each through all routers, best first. Where there are many, a look at a few tokens leaves
    the hopeless behind; the trained router is always kept."""
    tried = list(dict.fromkeys((TRAINED, *tried)))
    if len(tried) > BEST and case.evidence.tokens > 4 * FEW and case.evidence.counts is None:
        few = replace(case, evidence=case.evidence.cut(FEW))
        looked = _fit_all(few, tried, watch)
        best = max(candidate.nats for candidate in looked)
        tried = [c.hypothesis for c in looked if c.nats >= best - KEPT or c.hypothesis is TRAINED]
    return ranked(_fit_all(case, tried, watch))


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """Best first; those within a nat of the best in the order in which they were tried."""
    best = max((candidate.nats for candidate in found), default=0.0)
    order = sorted(found, key=lambda c: -c.nats)
    level = [c for c in found if c.nats >= best - LEVEL]
    return [*level, *(c for c in order if c not in level)]


def _fit_all(case: Case, tried: Sequence[Hypothesis], watch: Watch) -> list[Candidate]:
    found = []
    for number, hypothesis in enumerate(tried):
        watch(hypothesis.expression, number, len(tried))
        found.append(Candidate(hypothesis, case.fitted(case.predicted(hypothesis))))
    return found


def best_pairs(
    case: Case, singles: Sequence[Candidate], watch: Watch = lambda what, at, of: None
) -> list[Candidate]:
    """Pairs among the best singles, on few tokens; those left standing are fitted to all."""
    few = replace(case, evidence=case.evidence.cut(FEW))
    chosen = [candidate.hypothesis for candidate in singles[:BEST]]
    tried = hypotheses.pairs(chosen, case.model.interpreter.routers)
    if not tried:
        return []
    if case.evidence.counts is None:
        tried = survivors(first_router(few, tried))
    looked = sorted(_fit_all(few, tried, watch), key=lambda c: -c.nats)
    kept = [c.hypothesis for c in looked if c.nats >= looked[0].nats - KEPT][:BEST]
    return ranked(_fit_all(case, kept, watch))


def errors(case: Case, predicted: Predicted) -> F64:
    """[N, L]: the error of logits that would explain each row; NaN where nothing was recorded."""
    compared = case.compared(predicted)
    recorded = (case.data[0] >= 0).any(2)
    return np.where(recorded, np.stack([one.error() for one in compared], 1), np.nan)
