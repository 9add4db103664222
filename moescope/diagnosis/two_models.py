"""Two checkpoints side by side: an original and its quantised copy, a base and one tuned of it.

Both are loaded in one process and fed the same token ids, so their tokenizers must agree. With
*same tokens* both are fed one text, and what each router read is kept, so that a flip can be laid
to the gate or to the input, and to single rows of the gate. *Free*, each writes its own.
Lane A is the first model, lane B the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moescope.diagnosis.causes import InputsJudge, Watched
from moescope.diagnosis.compare import Pairing
from moescope.diagnosis.compare_run import CompareRun, LaneResult, lane_result, specs_under
from moescope.diagnosis.forced import Fed, feed
from moescope.diagnosis.gate_rows import GateBlame
from moescope.engine.framing import frame_of
from moescope.engine.lane import Lane, policies_of
from moescope.engine.protocol import Generate
from moescope.engine.sampling import Expectation
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.frames import Frame, TraceEvent, TraceMeta


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: a `LoadedModel`, its tokenizer (None: there is none), the variant it runs."""

    model: Any
    tokenizer: Any
    variant: str = "trained"

    @property
    def name(self) -> str:
        return single_line(str(self.model.facts.get("name", "")), 80)


def check_pair(a: Side, b: Side) -> None:
    """Refuse models whose routers or vocabularies do not correspond."""
    ours, theirs = a.model.interpreter, b.model.interpreter
    pairs = [("vocabulary", ours.vocab_size, theirs.vocab_size)]
    pairs.append(("routers", len(ours.routers), len(theirs.routers)))
    for one, other in zip(ours.routers, theirs.routers, strict=False):
        pairs.append((f"layer {one.layer}: router's layer", one.layer, other.layer))
        pairs.append((f"layer {one.layer}: experts", one.spec.E, other.spec.E))
    for what, expected, found in pairs:
        if expected != found:
            raise MoescopeError(
                f"{b.name}: {what}: expected {expected} as in {a.name}, found {found}",
                hint="two checkpoints of one architecture",
            )


def check_tokens(a: Side, b: Side, ids: Sequence[int], text: str | None) -> None:
    """Refuse tokenizers that do not read the same ids the same way, naming the first difference.
    Where one model has none, the other's is taken on trust."""
    if a.tokenizer is None or b.tokenizer is None:
        return
    if text is not None:
        theirs = list(b.tokenizer.encode(text))
        ours = list(a.tokenizer.encode(text))
        at = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
        if at is None and len(ours) != len(theirs):
            at = min(len(ours), len(theirs))
        if at is not None:
            raise _unlike(a, b, at, ours[at : at + 1], theirs[at : at + 1])
    for at, token in enumerate(ids):
        if a.tokenizer.piece(token) != b.tokenizer.piece(token):
            raise _unlike(a, b, at, [token], [token])


def _unlike(a: Side, b: Side, at: int, ours: list[int], theirs: list[int]) -> MoescopeError:
    def said(side: Side, ids: list[int]) -> str:
        if not ids:
            return "nothing"
        return f"{ids[0]} {single_line(side.tokenizer.piece(ids[0]), 40)!r}"

    return MoescopeError(
        f"tokenizers differ at token {at}: {a.name} has {said(a, ours)}, "
        f"{b.name} {said(b, theirs)}",
        hint="checkpoints with one tokenizer, or --prompt-ids",
    )


def meta_of_both(a: TraceMeta, b: TraceMeta) -> TraceMeta:
    """One trace of two models: the second's routers and tensors after the first's."""
    count = len(a.routers)
    moved = {index + count: tensors for index, tensors in b.router_tensors.items()}
    return replace(
        a,
        models=(*a.models[:1], *b.models[:1]),
        routers=(*a.routers, *(replace(router, model=1) for router in b.routers)),
        router_tensors={**a.router_tensors, **moved},
        engine={**a.engine, "second": b.engine},
    )


def run_same_tokens(
    a: Side,
    b: Side,
    ids: Sequence[int],
    *,
    prompt: int | None = None,
    writer: Any = None,
    watch: Callable[[Frame], None] | None = None,
    keep_rows: bool = False,
) -> CompareRun:
    """Feed both models `ids`, of which the first `prompt` (None: all) count as a prompt, and
    compare them. Flips are laid to gate or input where both interpreters can be watched."""
    check_pair(a, b)
    check_tokens(a, b, ids, None)
    layers = [router.layer for router in a.model.interpreter.routers]
    seen, blame = _watch(a, b, layers)
    judge = None
    if seen is not None:
        sides = ((seen[0], 0, specs_under(a.model)), (seen[1], 0, specs_under(b.model)))
        judge = InputsJudge(*sides, blamed=blame)
    pairing = Pairing(0, 1, layers, judge, keep_rows)
    lanes = [_lane(index, side, ids, prompt) for index, side in enumerate((a, b))]
    record = _Record(writer, lanes, (a, b), ids[: lanes[0].start])
    invalid = ""
    try:
        for frames, failed in _lockstep(a, b, lanes, ids):
            for frame in frames:
                pairing.feed(frame)
                record.frame(frame)
                if watch is not None:
                    watch(frame)
            record.recorder.send()
            if failed:
                invalid = failed
                break
    finally:
        if seen is not None:
            a.model.interpreter.set_intervention(None)
            b.model.interpreter.set_intervention(None)
        record.close()
    for lane in lanes:
        lane.reason = "invalid_logits" if invalid else "length"
    return CompareRun(
        tuple(lane_result(lane) for lane in lanes),
        (pairing.result(),),
        invalid,
        record.stopped,
        (pairing.rows,) if pairing.rows is not None else (),
        None if blame is None else blame.result(),
    )


def _watch(
    a: Side, b: Side, layers: Sequence[int]
) -> tuple[tuple[Watched, Watched] | None, GateBlame | None]:
    interpreters = a.model.interpreter, b.model.interpreter
    if not all(hasattr(interpreter, "set_intervention") for interpreter in interpreters):
        return None, None
    seen = Watched(), Watched()
    for interpreter, watched in zip(interpreters, seen, strict=True):
        interpreter.set_intervention(watched)
    tensors = [router.tensors for router in interpreters[1].routers]
    return seen, GateBlame(layers, tensors, b.model.spec.hidden)


def _lane(index: int, side: Side, ids: Sequence[int], prompt: int | None) -> Lane:
    interpreter = side.model.interpreter
    policies = policies_of(side.variant, interpreter.routers, interpreter.dtype)
    lane = Lane(index, side.variant, policies)
    lane.begin(list(ids), 0, len(ids) if prompt is None else prompt, None, lane.sampling)
    return lane


def _lockstep(
    a: Side, b: Side, lanes: Sequence[Lane], ids: Sequence[int]
) -> Iterator[tuple[list[Frame], str]]:
    """Frames of both, chunk by chunk, and a message once one met logits that are not finite."""
    pair = (feed(side.model, ids, variant=side.variant, record="logits") for side in (a, b))
    for fed_a, fed_b in zip(*pair, strict=True):
        frames = []
        for t, first in enumerate(fed_a.after):
            for lane, side, fed in ((lanes[0], a, fed_a), (lanes[1], b, fed_b)):
                frames.append(_frame(lane, side, fed, t, first if lane.index else None))
                if np.isnan(frames[-1].score_sum).any():
                    router = int(np.flatnonzero(np.isnan(frames[-1].score_sum))[0])
                    layer = side.model.interpreter.routers[router].layer
                    yield frames, f"{side.name}: layer {layer}: router logits are not finite"
                    return
        yield frames, ""


def _frame(lane: Lane, side: Side, fed: Fed, t: int, first: Expectation | None) -> Frame:
    token, after = lane.ids[lane.fed], fed.after[t]
    told = lane.told_of(token)
    text = lane.say(side.tokenizer, token, lane.fed + 1 == len(lane.ids))
    frame = frame_of(
        lane,
        fed.output,
        (0, t),
        sequence=0,
        record="logits",
        told=told,
        text=text,
        after=after,
        first=first,
    )
    lane.took(text, told, after)
    return frame


class _Record:
    """What a session would tell a writer: events of both lanes, and their frames."""

    def __init__(
        self, writer: Any, lanes: Sequence[Lane], sides: Sequence[Side], prompt: Sequence[int]
    ) -> None:
        from moescope.engine.recording import Recorder

        self.recorder = Recorder(writer)
        self.tokenizer = sides[0].tokenizer
        self.lanes = lanes
        for lane in lanes:
            told = {"sequence": 0, "expression": lane.expression}
            self.recorder.event(TraceEvent("variant", told, lane.index))
            data = {"sequence": 0, "prompt_ids": list(prompt)}
            self.recorder.event(TraceEvent("prompt", data, lane.index))

    def frame(self, frame: Frame) -> None:
        self.recorder.frame(frame)
        if self.tokenizer is not None:
            ids = (frame.token_id, *(i for i, _ in frame.alternatives))
            self.recorder.pieces({i: self.tokenizer.piece(i) for i in ids})

    def close(self) -> None:
        for lane in self.lanes:
            data = {"sequence": 0, "reason": lane.reason or "length"}
            self.recorder.event(TraceEvent("finished", data, lane.index, lane.fed))
        self.recorder.close()

    @property
    def stopped(self) -> str:
        return "" if self.recorder.failure is None else self.recorder.failure.message


def written(side: Side, request: Generate, max_context: int) -> list[int]:
    """The ids that one model writes by itself after the prompt of `request`."""
    session = Session(
        side.model,
        side.tokenizer,
        record="ids",
        max_context=max_context,
        variants=(side.variant,),
    )
    for _ in session.generate(request):
        pass
    if session.invalid:
        raise MoescopeError(f"{side.name}: {session.invalid}", code=ExitCode.FOUND)
    return session.lanes[0].new_ids


# --- free ----------------------------------------------------------------------------------------


def run_free(
    a: Side,
    b: Side,
    request: Generate,
    *,
    writer: Any = None,
    max_context: int = 4096,
    watch: Callable[[Frame], None] | None = None,
    keep_rows: bool = False,
) -> CompareRun:
    """Each model writes its own text; nothing is said of causes, as inputs are not kept."""
    check_pair(a, b)
    layers = [router.layer for router in a.model.interpreter.routers]
    pairing = Pairing(0, 1, layers, None, keep_rows)
    sessions = [
        Session(
            side.model,
            side.tokenizer,
            None if writer is None else _OfLane(writer, index),
            record="weights",
            max_context=max_context,
            variants=(side.variant,),
        )
        for index, side in enumerate((a, b))
    ]
    try:
        for session in sessions:
            session.start(request)
        while any(session.running for session in sessions):
            for index, session in enumerate(sessions):
                for frame in session.step():
                    frame = replace(frame, lane=index)
                    pairing.feed(frame)
                    if watch is not None:
                        watch(frame)
    finally:
        for session in sessions:
            session.close()
    failures = [session.recorder.failure for session in sessions]
    return CompareRun(
        tuple(_result(index, session) for index, session in enumerate(sessions)),
        (pairing.result(),),
        next((session.invalid for session in sessions if session.invalid), ""),
        next((failure.message for failure in failures if failure is not None), ""),
        (pairing.rows,) if pairing.rows is not None else (),
    )


def _result(index: int, session: Session) -> LaneResult:
    return replace(lane_result(session.lanes[0]), lane=index)


class _OfLane:
    """One writer for two sessions: what a session says of its lane 0 is said of `lane`."""

    def __init__(self, writer: Any, lane: int) -> None:
        self.writer, self.lane = writer, lane

    def extend(self, frames: Iterable[tuple[Frame, Any]]) -> None:
        self.writer.extend([(replace(frame, lane=self.lane), arrays) for frame, arrays in frames])

    def event(self, event: TraceEvent) -> None:
        self.writer.event(replace(event, lane=self.lane))

    def close(self) -> None:
        """The writer is closed by whoever opened it."""

    @property
    def acknowledged(self) -> int:
        return int(self.writer.acknowledged)

    @property
    def dropped_logits(self) -> int:
        return int(self.writer.dropped_logits)
