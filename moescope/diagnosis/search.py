"""The search: which hypotheses a trace leaves standing, and how far each is from the others.

Singles first, on the first router, where the input is right whatever follows; the survivors through
the whole model, with the recorded experts forced, so that every layer is judged on the state it
must have had. Pairs only where no single explains the trace. Everything is counted in nats
(`likelihood`); what they mean is decided in `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import hypotheses
from moescope.diagnosis.case import Candidate, Case, Held, Predicted
from moescope.diagnosis.emulate import OURS, Engine, spec_in
from moescope.diagnosis.evidence import Evidence
from moescope.diagnosis.hypotheses import TRAINED, Hypothesis
from moescope.diagnosis.likelihood import LEVEL, Fit
from moescope.diagnosis.weighed import last_cast
from moescope.kernels.reference import F64
from moescope.kernels.spec import RouterSpec
from moescope.variants import apply

FEW = 64  # tokens of the first look, and of pairs
BEST = 10  # singles that pairs are made of
NEAR = 1000.0  # nats behind the best that another dtype of the engine might make up for
KEPT = 30.0  # nats behind the best after which nobody comes back
# the least and the most noise, in logits, for which a dtype of the engine is considered
NOISE_OF = {"float32": (0.0, 10.0), "float16": (1e-4, 5e-3), "bfloat16": (1e-4, 10.0)}
MOST = 0.15  # of the spread of a row's logits: no engine is that far off
FAIR = 8.0  # nats that the trained router may be behind and still decide what is not told
Watch = Callable[[str, int, int], None]  # what is done, of how many


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
