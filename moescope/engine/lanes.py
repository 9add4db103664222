"""The lanes of one loaded model: how much room they have, how they end, and what is told of them.

What every part of a session stands on. Who opens and prompts lanes is in `session.py`, what feeds
them in `stepping.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moescope.engine import sampling
from moescope.engine.crossed import Crossing
from moescope.engine.lane import Lane, letter, policies_of, steering_of
from moescope.engine.protocol import Event, Finished, Generate, LaneChanged, Note
from moescope.engine.recording import Recorder
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from moescope.trace.frames import Frame, RecordLevel, TraceEvent

ROOM = 256  # caches grow in steps of this many tokens


class Lanes:
    """State of a session, and the small things all of it needs. See `Session`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        writer: Any,
        record: RecordLevel,
        max_context: int,
        same_tokens: bool,
    ) -> None:
        self.interpreter = model.interpreter
        self.tokenizer = tokenizer
        self.recorder = Recorder(writer)
        self.record: RecordLevel = record
        self.longest: int | None = model.facts.get("context")  # no option makes it longer
        self.context = min(max_context, self.longest or max_context)
        self.same_tokens = same_tokens
        self.sequence = -1
        self.lanes: dict[int, Lane] = {}
        self.newest: dict[int, Frame] = {}
        self.invalid = ""  # the message, once router or token logits were not finite
        self.timings = {
            "prefill_tokens": 0,
            "prefill_seconds": 0.0,
            "decode_tokens": 0,
            "decode_seconds": 0.0,
        }
        self._end_ids: tuple[int, ...] = tuple(tokenizer.end_ids) if tokenizer else ()
        self._opened = (0, 0)  # lanes, capacity
        self._used: set[int] = set()  # lane numbers that have frames in this sequence
        self._events: list[Event] = []
        self._pieces: dict[int, str] = {}  # first seen, not yet taken
        self._pieces_known: set[int] = set()
        self.shadows: tuple[str, ...] = ()
        self.crossing = Crossing()
        self.crosses = False  # whether gates are crossed though every lane writes its own text

    @property
    def running(self) -> bool:
        return any(lane.running for lane in self.lanes.values())

    @property
    def prefilling(self) -> bool:
        return any(
            lane.running and (lane.pending > 1 or lane.fed < lane.start)
            for lane in self.lanes.values()
        )

    def take_events(self) -> list[Event]:
        """What happened beside the frames since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def take_pieces(self) -> tuple[tuple[int, str], ...]:
        """Texts of ids that appeared for the first time since the last call."""
        pieces, self._pieces = self._pieces, {}
        return tuple(pieces.items())

    # --- how a lane goes on, and ends -------------------------------------------------------------

    def _go_on(self, lane: Lane) -> None:
        """After everything given was fed: draw the next token, or finish the lane."""
        if lane.reason == "invalid_logits":
            return
        lane.running = True
        if lane.pending:
            return
        reason = lane.ending(self._end_ids, self.context) if lane.fed > lane.start else ""
        if not reason and lane.fed == lane.start and lane.sampling.max_new_tokens == 0:
            reason = "length"
        if not reason and lane.fed >= self.context:
            reason = "context"
        if reason:
            self._finish(lane, reason)
        elif lane.expected is None:
            self._fail(lane, f"sampling stopped: token logits are not finite at token {lane.fed}")
        elif not (self.same_tokens and lane.index and 0 in self.lanes):
            self._reserve(self._opened[0], lane.fed + 1)
            chosen, lane.drawn = lane.drawn, None
            if chosen is None:
                chosen = sampling.choose(lane.expected, lane.sampling, lane.fed)
            lane.ids.append(chosen)

    def _fail(self, lane: Lane, message: str) -> None:
        self.invalid = message
        at = {"sequence": self.sequence, "message": message}
        self._tell(TraceEvent("error", at, lane.index, lane.fed))
        self._events.append(Note(f"lane {letter(lane.index)}: {message}", "error"))
        self._finish(lane, "invalid_logits")

    def _finish(self, lane: Lane, reason: str) -> None:
        lane.running, lane.reason = False, reason
        at = {"sequence": self.sequence, "reason": reason}
        self._tell(TraceEvent("finished", at, lane.index, lane.fed))
        self._events.append(Finished(lane.index, lane.fed, reason))

    # --- room and policies ------------------------------------------------------------------------

    def _lane(self, index: int) -> Lane:
        if index not in self.lanes:
            raise MoescopeError(f"lane {letter(index)} is not open")
        return self.lanes[index]

    def _runner(self, index: int) -> tuple[Any, int]:
        """The interpreter that runs a lane, and the lane's number there: of two models, one."""
        runner = getattr(self.interpreter, "runner", None)
        return (self.interpreter, index) if runner is None else runner(index)

    def _policies(
        self, expression: str, interpreter: Any = None
    ) -> tuple[str, tuple[RouterPolicy, ...]]:
        """An expression in its one way of writing, and its policies for `interpreter` (None: the
        session's)."""
        from moescope.variants import steering

        if interpreter is None:
            interpreter = self.interpreter
        expression = steering.canonical(expression)
        policies = policies_of(expression, interpreter.routers, interpreter.dtype)
        steering_of(expression, interpreter, policies)  # refused before anything changes
        return expression, policies

    def _reserve_for(self, prompt: int, forced: int, request: Generate) -> None:
        more = forced or min(request.sampling.max_new_tokens, 2 * ROOM)
        self._reserve(max(self.lanes) + 1, min(prompt + more, self.context))

    def _reserve(self, lanes: int, tokens: int) -> None:
        """Room for `tokens` in every lane; grows in steps, never beyond the context."""
        held, capacity = self._opened
        if tokens > capacity:  # doubling keeps the copies few
            tokens = max(tokens, min(2 * capacity, capacity + 4 * ROOM))
            capacity = min(self.context, -(-tokens // ROOM) * ROOM)
        wanted = (max(lanes, held), capacity)
        if wanted == self._opened:
            return
        self.interpreter.open(*wanted)
        self._opened = wanted
        for lane in self.lanes.values():
            self._route(lane.index, lane.expression, lane.policies)

    def _route(self, index: int, expression: str, policies: Sequence[RouterPolicy]) -> None:
        """Put a lane under a variant; one that edits more than policies rebuilds the step."""
        from moescope.engine.rewired_lanes import rewirable
        from moescope.variants import steering

        variant, steered = steering.split(expression)
        self.interpreter = rewirable(self.interpreter, variant)
        self.interpreter.set_policies(index, policies)
        if hasattr(self.interpreter, "set_wiring"):
            self.interpreter.set_wiring(index, variant)
        runner, number = self._runner(index)
        if steered or getattr(runner, "intervene", None) is not None:
            from moescope.engine.steered_lanes import steer

            steer(runner, number, steering_of(expression, runner, policies))

    def _compare_ids(self, lane: Lane) -> None:
        first = self.lanes.get(0)
        lane.like_first = first is not None and first.ids[: lane.fed] == lane.ids[: lane.fed]

    # --- what is told -----------------------------------------------------------------------------

    def _meet(self, ids: Sequence[int]) -> None:
        if self.tokenizer is None:
            return
        fresh = {i: self.tokenizer.piece(i) for i in ids if i not in self._pieces_known}
        self._pieces_known.update(fresh)
        self._pieces.update(fresh)
        self.recorder.pieces(fresh)

    def _changed(
        self, lane: Lane, kind: str, state: Any = "open", fork_of: int | None = None
    ) -> None:
        data: dict[str, Any] = {"sequence": max(self.sequence, 0), "expression": lane.expression}
        if lane.model:
            data["model"] = lane.model
        if fork_of is not None:
            data["fork_of"] = fork_of
        if state == "dropped":
            data["text"] = f"lane {letter(lane.index)} dropped"
        self._tell(TraceEvent(kind, data, lane.index, lane.fed))
        self._events.append(
            LaneChanged(
                lane.index,
                lane.expression,
                lane.fed,
                state=state,
                fork_of=fork_of,
                model=lane.model,
            )
        )

    def _tell(self, event: TraceEvent) -> None:
        self._note(self.recorder.event(event))

    def _note(self, note: Note | None) -> None:
        if note is not None:
            self._events.append(note)
