"""Running lanes of one model side by side, and comparing them as they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from moescope.diagnosis.causes import InputsJudge, LogitsJudge, Watched
from moescope.diagnosis.compare import Comparison, Judge, Pairing, plain
from moescope.diagnosis.gate_rows import GateRows
from moescope.engine.lane import policies_of
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
    teacher_forced: bool = False,
    force_ids: Sequence[int] = (),
    writer: Any = None,
    max_context: int = 4096,
    watch: Callable[[Frame], None] | None = None,
    keep_rows: bool = False,
) -> CompareRun:
    """Run `request` under each variant as lanes of one batch and compare them with the first.

    `teacher_forced` feeds every lane what the first one draws; `force_ids` feeds all of them these
    ids after the prompt. `watch` sees each frame as it is made. `keep_rows` keeps every token and
    layer of every comparison.
    """
    from moescope.engine.session import Session

    interpreter = model.interpreter
    session = Session(
        model,
        tokenizer,
        writer,
        record="logits",  # judges read them; what a file keeps is its writer's business
        max_context=max_context,
        variants=variants,
        same_tokens=teacher_forced,
    )
    layers = [router.layer for router in interpreter.routers]
    first, *others = sorted(session.lanes)
    watched = _watched(model, variants)
    pairings = [
        Pairing(first, other, layers, judge_of(model, watched, first, other), keep_rows)
        for other in others
    ]
    try:
        for frame in session.generate(request, force_ids=force_ids):
            for pairing in pairings:
                pairing.feed(frame)
            if watch is not None:
                watch(frame)
    finally:
        session.close()
        if watched is not None:
            interpreter.set_intervention(watched.before)
    failure = session.recorder.failure
    return CompareRun(
        tuple(lane_result(lane) for lane in session.lanes.values()),
        tuple(pairing.result() for pairing in pairings),
        session.invalid,
        "" if failure is None else failure.message,
        tuple(pairing.rows for pairing in pairings if pairing.rows is not None),
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
    interpreter = model.interpreter

    @lru_cache(maxsize=64)
    def specs(expression: str) -> tuple[RouterSpec, ...]:
        policies = policies_of(expression, interpreter.routers, interpreter.dtype)
        return tuple(
            replace(router.spec, policy=policy).resolved(interpreter.dtype)
            for router, policy in zip(interpreter.routers, policies, strict=True)
        )

    return specs


def _watched(model: Any, variants: Sequence[str]) -> Watched | None:
    """Keeps what routers read where some variant turns the gate itself; else logits tell all."""
    specs = specs_under(model)
    bits = {spec.policy.gate_quant_bits for variant in variants for spec in specs(variant)}
    observe = getattr(model.interpreter, "set_intervention", None)
    if len(bits) < 2 or observe is None:
        return None
    watched = Watched(before=model.interpreter.intervene)
    observe(watched)
    return watched


def judge_of(model: Any, watched: Watched | None, a: int, b: int) -> Judge:
    """The judge of two lanes of one model."""
    specs = specs_under(model)
    if watched is None:
        return LogitsJudge(specs, [router.tensors for router in model.interpreter.routers])
    return InputsJudge((watched, a, specs), (watched, b, specs))
