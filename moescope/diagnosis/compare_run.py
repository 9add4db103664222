"""Running lanes of one model side by side, and comparing them as they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moescope.diagnosis.causes import FlipsJudge, LogitsJudge
from moescope.diagnosis.compare import Comparison, Judge, Pairing, Units, plain
from moescope.diagnosis.gate_rows import GateBlame, GateRows
from moescope.engine.lane import policies_of, specs_of
from moescope.engine.protocol import Generate
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import Frame


@dataclass(frozen=True, slots=True)
class LaneResult:
    """What one lane wrote."""

    lane: int
    variant: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class CompareRun:
    lanes: tuple[LaneResult, ...]
    comparisons: tuple[Comparison, ...]
    invalid: str  # the message, where generation met logits that are not finite
    stopped: str  # the message, where the recording stopped before the end
    rows: tuple[list[dict[str, Any]], ...] = ()  # per comparison and token, where asked for
    gate_rows: GateRows | None = None  # of two checkpoints fed the same tokens

    def to_json(self) -> dict[str, Any]:
        """What was not asked for is left out."""
        document: dict[str, Any] = plain(self)
        return {k: v for k, v in document.items() if k not in ("rows", "gate_rows") or v}


def run_compare(
    model: Any,
    tokenizer: Any,
    variants: Sequence[str],
    request: Generate,
    *,
    models: Sequence[int] = (),
    teacher_forced: bool = False,
    force_ids: Sequence[int] = (),
    writer: Any = None,
    max_context: int = 4096,
    watch: Callable[[Frame], None] | None = None,
    keep_rows: bool = False,
) -> CompareRun:
    """Run `request` under each variant as lanes of one batch and compare them with the first.

    `teacher_forced` feeds every lane what the first one draws; `force_ids` feeds all of them these
    ids after the prompt. `models` says of each variant which of two models beside each other runs
    it. `watch` sees each frame as it is made. `keep_rows` keeps every token and layer of every
    comparison.
    """
    from moescope.engine.session import Session

    session = Session(
        model,
        tokenizer,
        writer,
        record="logits",  # judges read them; what a file keeps is its writer's business
        max_context=max_context,
        variants=variants,
        models=models,
        same_tokens=teacher_forced,
    )
    layers = [router.layer for router in model.interpreter.routers]
    first, *others = sorted(session.lanes)
    second = getattr(model, "second", None)
    blame = GateBlame(layers, getattr(getattr(second, "spec", None), "hidden", None))
    judges = [_judge(model, session, (first, other), blame) for other in others]
    session.crosses = any(crosses for _, crosses in judges)
    pairings = [
        Pairing(first, other, layers, judge, keep_rows, _units(model, session, (first, other)))
        for other, (judge, _) in zip(others, judges, strict=True)
    ]
    crossed = False
    try:
        for frame in session.generate(request, force_ids=force_ids):
            crossed = session.crossing.active
            for pairing in pairings:
                pairing.feed(frame)
            if watch is not None:
                watch(frame)
    finally:
        session.close()
    failure = session.recorder.failure
    return CompareRun(
        tuple(lane_result(lane) for lane in session.lanes.values()),
        tuple(pairing.result() for pairing in pairings),
        session.invalid,
        "" if failure is None else failure.message,
        tuple(pairing.rows for pairing in pairings if pairing.rows is not None),
        blame.result() if second is not None and crossed else None,
    )


def lane_result(lane: Any) -> LaneResult:
    """What a session's lane wrote."""
    return LaneResult(
        lane=lane.index,
        variant=lane.expression,
        prompt_ids=tuple(lane.prompt_ids),
        token_ids=tuple(lane.new_ids),
        text=lane.text,
        reason=lane.reason,
    )


def specs_under(model: Any) -> Callable[[str], tuple[RouterSpec, ...]]:
    """The resolved specs of every router of `model` under a variant expression."""
    return _specs_of(model.interpreter)


def _specs_of(interpreter: Any) -> Callable[[str], tuple[RouterSpec, ...]]:

    @lru_cache(maxsize=64)
    def specs(expression: str) -> tuple[RouterSpec, ...]:
        policies = policies_of(expression, interpreter.routers, interpreter.dtype)
        return specs_of(interpreter.routers, policies, interpreter.dtype)

    return specs


def units_under(specs_of: Callable[[str], tuple[RouterSpec, ...]]) -> Units:
    """What the margins of each router are of under a lane expression."""

    @lru_cache(maxsize=64)
    def units(expression: str) -> tuple[str, ...]:
        return tuple(spec.margin_unit for spec in specs_of(expression))

    return units


def _units(model: Any, session: Any, pair: tuple[int, int]) -> tuple[Units, Units]:
    a, b = (_specs_of(_interpreter(model, session.lanes[lane].model)) for lane in pair)
    return units_under(a), units_under(b)


def _interpreter(model: Any, which: int) -> Any:
    """Of a model, or of two, the one that runs a lane."""
    return getattr(model.interpreter, "models", [model.interpreter])[which]


def _judge(
    model: Any, session: Any, pair: tuple[int, int], blame: GateBlame | None
) -> tuple[Judge, bool]:
    """The judge of two lanes, and whether it needs their gates crossed."""
    which = {session.lanes[lane].model for lane in pair}
    one = _interpreter(model, min(which))
    specs = _specs_of(one)
    expressions = [session.lanes[lane].expression for lane in pair]
    bits = {spec.policy.gate_quant_bits for e in expressions for spec in specs(e)}
    if len(which) == 1 and len(bits) == 1:
        return LogitsJudge(specs, [router.tensors for router in one.routers]), False
    taken = blame.take if blame is not None and len(which) == 2 else lambda flips: None
    return FlipsJudge(lambda: session.crossing.found, taken), True
