"""A session: up to eight lanes of one loaded model, and the step that feeds them.

`step()` feeds what is pending in the running lanes as one batch, builds a frame for every token
fed, and draws the next ones. Every token of a lane is fed and has a frame, the last one too.
Headless commands iterate over `generate`; the engine's process calls `step` between two looks at
its commands. No processes and no files here: frames and events go to the writer that was given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine import sampling
from moescope.engine.framing import frame_of
from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.lane import Lane, letter, policies_of, refuse_rewiring
from moescope.engine.prompts import check_ids, common_prefix, further, prompt_of
from moescope.engine.protocol import (
    MAX_LANES,
    Event,
    Finished,
    Generate,
    LaneChanged,
    Note,
    Prompted,
)
from moescope.engine.recording import Recorder
from moescope.engine.sampling import Expectation
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy
from moescope.trace.frames import Frame, RecordLevel, TraceEvent

CHUNK = 128  # tokens of a prompt fed at once: pause, stop and progress wait no longer than that
LOGITS_BYTES = 96 << 20  # next-token logits of one chunk, which a large vocabulary makes the limit
ROOM = 256  # caches grow in steps of this many tokens


class Session:
    """Lanes over one model: a `LoadedModel`, of which only `interpreter` and `facts` are used.

    `tokenizer` None: prompts are ids, texts stay empty. `writer` is a `TraceWriter` or None. With
    `same_tokens`, every lane is fed the tokens lane 0 draws. `shadows` are variants that the router
    logits of every lane are routed under too; nothing of them is executed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        writer: Any = None,
        *,
        record: RecordLevel = "weights",
        max_context: int = 4096,
        variants: Sequence[str] = ("trained",),
        same_tokens: bool = False,
        shadows: Sequence[str] = (),
    ) -> None:
        self.interpreter = model.interpreter
        self.tokenizer = tokenizer
        self.recorder = Recorder(writer)
        self.record: RecordLevel = record
        self.context = min(max_context, int(model.facts.get("context") or max_context))
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
        for expression in variants:
            self.add_lane(expression)
        self.shadows: tuple[str, ...] = ()
        if shadows:
            self.set_shadows(shadows)

    # --- what a screen or a command asks ----------------------------------------------------------

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

    def generate(self, request: Generate, *, force_ids: Sequence[int] = ()) -> Iterator[Frame]:
        """Run `request` to its end on every lane, frame by frame. `force_ids` follow the prompt
        in place of drawn tokens."""
        self.start(request, force_ids=force_ids)
        while self.running:
            yield from self.step()

    def add_lane(
        self, expression: str, fork_of: int | None = None, position: int | None = None
    ) -> int:
        """Open a lane; returns its number. See `protocol.AddLane`."""
        if len(self.lanes) >= MAX_LANES:
            raise MoescopeError(f"at most {MAX_LANES} lanes can be open")
        if fork_of is not None and fork_of not in self.lanes:
            raise MoescopeError(f"lane {letter(fork_of)} is not open")
        expression, policies = self._policies(expression)
        free = [number for number in range(MAX_LANES) if number not in self.lanes]
        index = next((number for number in free if number not in self._used), free[0])
        lane = Lane(index, expression, policies)
        self._reserve(index + 1, max(self._opened[1], 1))
        if fork_of is not None:
            source = self.lanes[fork_of]
            at = source.fed if position is None else min(max(0, position), source.fed)
            self.interpreter.copy(fork_of, index, at)
            lane.take_over(source, at)
        else:
            self.interpreter.truncate(index, 0)
        self._route(index, expression, policies)
        self.lanes[index] = lane
        self._used.add(index)
        self._compare_ids(lane)
        self._changed(lane, "fork" if fork_of is not None else "variant", fork_of=fork_of)
        if fork_of is not None:
            self._go_on(lane)
        return index

    def drop_lane(self, index: int) -> None:
        lane = self._lane(index)
        if len(self.lanes) == 1:
            raise MoescopeError("the last lane cannot be dropped")
        del self.lanes[index]
        self.newest.pop(index, None)
        self.interpreter.truncate(index, 0)
        self._changed(lane, "note", state="dropped")

    def set_variant(self, index: int, expression: str) -> None:
        """From the next token on, the lane runs under `expression`."""
        lane = self._lane(index)
        expression, policies = self._policies(expression)
        self._route(index, expression, policies)
        lane.expression, lane.policies = expression, policies
        self._changed(lane, "variant")

    def set_shadows(self, expressions: Sequence[str]) -> None:
        """From the next token on, record what these variants would have picked."""
        for expression in expressions:
            refuse_rewiring(expression)
        parsed = dict(map(self._policies, expressions))
        if len(parsed) > MAX_LANES:
            raise MoescopeError(f"at most {MAX_LANES} shadow variants")
        self.interpreter.set_shadows(list(parsed.values()))
        self.shadows = tuple(parsed)

    def start(self, request: Generate, *, force_ids: Sequence[int] = ()) -> None:
        """Give every open lane the prompt of `request`; lanes that run are stopped. Where it is
        refused, lanes and texts stay as they were."""
        sampling.check(request.sampling)
        if request.continues and self.sequence >= 0:
            self.stop()
            self._continue(request, force_ids)
            return
        ids, messages = prompt_of(self.tokenizer, request)
        self._check([*ids, *force_ids])
        self.stop()
        self._reserve_for(len(ids), len(force_ids), request)
        self.sequence += 1
        self.invalid, self.newest, self._used = "", {}, set(self.lanes)
        for lane in self.lanes.values():
            self.interpreter.truncate(lane.index, 0)
            lane.cut(0)
            self._begin(lane, [*ids, *force_ids], 0, len(ids), messages, request)
        self._prompted("prompt", tuple(ids), 0, None, "", request)

    def stop(self) -> None:
        """Stop every lane after its last fed token. A token drawn and not yet fed is forgotten;
        going on draws it again."""
        for lane in self.lanes.values():
            if lane.running:
                lane.cut(lane.fed)
                self._finish(lane, "stopped")

    def close(self) -> None:
        """Commit the trace. The session is of no use after."""
        self._note(self.recorder.close())

    # --- the step ---------------------------------------------------------------------------------

    def step(self) -> list[Frame]:
        """Feed one batch; returns its frames, those of one lane together. [] when nothing runs."""
        lanes, width = self._batch()
        if not lanes:
            return []
        began = time.monotonic()
        prefill = lanes[0].fed < lanes[0].start
        ids = np.array([lane.ids[lane.fed : lane.fed + width] for lane in lanes], np.int64)
        output = self.interpreter.run(
            [lane.index for lane in lanes],
            ids,
            all_logits=width > 1,
            record=self.record,
            draws=self._draws(lanes) if width == 1 else None,
        )
        frames: list[Frame] = []
        first: dict[int, Expectation] = {}  # of lane 0 by position, what KL is taken against
        for row, lane in enumerate(lanes):
            frames += self._absorb(lane, output, row, width, first)
        self._note(self.recorder.send())
        for lane in lanes:
            self._go_on(lane)
        self._follow()
        kind = "prefill" if prefill else "decode"
        self.timings[f"{kind}_tokens"] += len(frames)
        self.timings[f"{kind}_seconds"] += time.monotonic() - began
        return frames

    def _batch(self) -> tuple[list[Lane], int]:
        """The lanes fed next, and how many tokens of each. Prompts first: lanes fall in step."""
        waiting = [lane for lane in self.lanes.values() if lane.running and lane.pending]
        behind = [lane for lane in waiting if lane.pending > 1 or lane.fed < lane.start]
        if not behind:
            return waiting, 1
        room = LOGITS_BYTES // (4 * self.interpreter.vocab_size * len(behind))
        return behind, min(CHUNK, max(1, room), *(lane.pending for lane in behind))

    def _draws(self, lanes: Sequence[Lane]) -> list[Draw] | None:
        """How the tokens after the next are drawn, where that is known to happen in every lane."""
        if not self.interpreter.draws:
            return None
        follows = self.same_tokens and 0 in self.lanes
        for lane in lanes:
            asked = lane.sampling.max_new_tokens > 0 and not (follows and lane.index)
            last = lane.pending == 1 and len(lane.ids) >= max(lane.start, lane.forced_until)
            over = len(lane.ids) > lane.start and lane.ending(self._end_ids, self.context)
            if not (asked and last) or over or len(lane.ids) >= self.context:
                return None
        return [
            Draw(lane.sampling, at, sampling.uniform(lane.sampling.seed, at))
            for lane in lanes
            for at in (len(lane.ids),)
        ]

    def _absorb(
        self, lane: Lane, output: StepOutput, row: int, width: int, first: dict[int, Expectation]
    ) -> list[Frame]:
        """Turn one lane's row of the output into frames, and hand them to the recorder."""
        frames = []
        lane.drawn = None if output.drawn is None else int(output.drawn[row])
        if output.expected is not None:
            afters = output.expected[row]
        else:
            afters = sampling.expectations(output.logits[row])
        finite = output.invalid_router is None
        for column in range(width):
            position = lane.fed
            routed = finite or not bool(np.isnan(output.score_sum[row, column]).any())
            after = afters[column] if routed else None
            if lane.index == 0 and after is not None:
                first[position] = after
            frame = self._frame(lane, output, (row, column), after, first.get(position))
            frames.append(frame)
            self.recorder.frame(frame, output.kept.record(row, column) if output.kept else None)
            if not routed:
                self._stop_invalid(lane, output.score_sum[row, column])
                break
        if lane.expected is not None and width > 1:  # the row is a view of the whole chunk
            lane.expected = replace(lane.expected, logits=lane.expected.row.copy())
        self.newest[lane.index] = frames[-1]
        return frames

    def _frame(
        self,
        lane: Lane,
        output: StepOutput,
        at: tuple[int, int],
        after: Expectation | None,
        first: Expectation | None,
    ) -> Frame:
        """The frame of the lane's next id, which then counts as fed."""
        position, token = lane.fed, lane.ids[lane.fed]
        lane.like_first = lane.like_first and self._same_as_first(position, token)
        compared = first if lane.index and lane.like_first else None
        told = lane.told_of(token)
        frame = frame_of(
            lane,
            output,
            at,
            sequence=self.sequence,
            record=self.record,
            told=told,
            text=lane.say(self.tokenizer, token, self._is_last(lane)),
            after=after,
            first=compared,
            shadows=self.shadows,
        )
        lane.took(frame.text, told, after)
        self._meet((token, *(i for i, _ in frame.alternatives)))
        return frame

    def _is_last(self, lane: Lane) -> bool:
        """Whether the lane's next id is the end of its answer."""
        last = lane.fed + 1 == len(lane.ids) and lane.fed >= lane.start
        return last and bool(lane.ending(self._end_ids, self.context))

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

    def _follow(self) -> None:
        """Where lanes are fed the same tokens: give the others what lane 0 drew, or its ending."""
        leader = self.lanes.get(0)
        if not self.same_tokens or leader is None:
            return
        for lane in self.lanes.values():
            if lane.index and lane.running and not lane.pending:
                lane.ids.extend(leader.ids[lane.fed :])
                if not lane.pending and not leader.running:
                    self._finish(lane, "stopped")

    def _stop_invalid(self, lane: Lane, score_sum: NDArray[np.float32]) -> None:
        router = self.interpreter.routers[int(np.flatnonzero(np.isnan(score_sum))[0])]
        lane.cut(lane.fed)
        self.interpreter.truncate(lane.index, lane.fed)
        self._fail(lane, f"layer {router.layer}: router logits are not finite")

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

    # --- prompts and turns ------------------------------------------------------------------------

    def _continue(self, request: Generate, force_ids: Sequence[int]) -> None:
        """A further turn on every lane; each continues its own answer."""
        plans = []
        for lane in self.lanes.values():
            ids, messages = further(self.tokenizer, lane, request, self._end_ids)
            self._check([*ids, *force_ids])
            plans.append((lane, ids, messages))
        longest = max(len(ids) for _, ids, _ in plans)
        self._reserve_for(longest, len(force_ids), request)
        self._used |= set(self.lanes)
        alike = len({tuple(ids) for _, ids, _ in plans}) == 1
        for lane, ids, messages in plans:
            shared = common_prefix(lane.ids, ids)
            note = ""
            if shared < lane.fed:
                shared = min(shared, len(ids) - 1)
                note = (
                    f"the chat rendered anew differs from token {shared} on; re-filled from there"
                )
                self.interpreter.truncate(lane.index, shared)
                lane.cut(shared)
            self._begin(lane, [*ids, *force_ids], shared, len(ids), messages, request)
            if not alike or lane.index == min(self.lanes):
                added = tuple(ids[shared:])
                which = None if alike else lane.index
                self._prompted("turn", added, shared, which, note, request)

    def _begin(
        self,
        lane: Lane,
        ids: list[int],
        begin: int,
        end: int,
        messages: Any,
        request: Generate,
    ) -> None:
        """Make ids [begin, end) of `lane` its newest prompt and set it running."""
        lane.begin(ids, begin, end, messages, request.sampling)
        self._compare_ids(lane)
        self._go_on(lane)

    def _prompted(
        self,
        kind: str,
        ids: tuple[int, ...],
        position: int,
        lane: int | None,
        note: str,
        request: Generate,
    ) -> None:
        data: dict[str, Any] = {
            "sequence": self.sequence,
            "prompt_ids": list(ids),
            "sampling": asdict(request.sampling),
        }
        if note:
            data["note"] = note
        for index in self.lanes if lane is None else (lane,):
            self._tell(TraceEvent(kind, data, index, position))
        piece = self.tokenizer.piece if self.tokenizer else lambda _: ""
        pieces = tuple(piece(i) for i in ids)
        self._events.append(Prompted(self.sequence, ids, pieces, note, lane, position))

    def _check(self, ids: Sequence[int]) -> None:
        check_ids(ids, self.interpreter.vocab_size, self.context)

    # --- small things -----------------------------------------------------------------------------

    def _lane(self, index: int) -> Lane:
        if index not in self.lanes:
            raise MoescopeError(f"lane {letter(index)} is not open")
        return self.lanes[index]

    def _policies(self, expression: str) -> tuple[str, tuple[RouterPolicy, ...]]:
        from moescope import variants

        expression = variants.canonical(expression)
        routers, dtype = self.interpreter.routers, self.interpreter.dtype
        return expression, policies_of(expression, routers, dtype)

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
        from moescope import variants

        if variants.parse(expression).rebuilds and not hasattr(self.interpreter, "set_wiring"):
            from moescope.engine.rewired_lanes import RewiredLanes

            self.interpreter = RewiredLanes(self.interpreter)
        self.interpreter.set_policies(index, policies)
        if hasattr(self.interpreter, "set_wiring"):
            self.interpreter.set_wiring(index, expression)

    def _same_as_first(self, position: int, token: int) -> bool:
        first = self.lanes.get(0)
        return first is not None and position < len(first.ids) and first.ids[position] == token

    def _compare_ids(self, lane: Lane) -> None:
        first = self.lanes.get(0)
        lane.like_first = first is not None and first.ids[: lane.fed] == lane.ids[: lane.fed]

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
        if fork_of is not None:
            data["fork_of"] = fork_of
        if state == "dropped":
            data["text"] = f"lane {letter(lane.index)} dropped"
        self._tell(TraceEvent(kind, data, lane.index, lane.fed))
        self._events.append(
            LaneChanged(lane.index, lane.expression, lane.fed, state=state, fork_of=fork_of)
        )

    def _tell(self, event: TraceEvent) -> None:
        self._note(self.recorder.event(event))

    def _note(self, note: Note | None) -> None:
        if note is not None:
            self._events.append(note)
