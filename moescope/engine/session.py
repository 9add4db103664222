"""A session: up to eight lanes of one loaded model.

It opens lanes, changes their variants, and gives them prompts and turns; `step()` feeds them (see
`stepping.py`). Headless commands iterate over `generate`; the engine's process calls `step` between
two looks at its commands. No processes and no files here: frames and events go to the writer that
was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from moescope.engine import sampling
from moescope.engine.beside import refuse_unlike
from moescope.engine.lane import Lane, letter, refuse_rewiring
from moescope.engine.prompts import check_ids, common_prefix, further, prompt_of
from moescope.engine.protocol import MAX_LANES, Generate, Note, Prompted
from moescope.engine.stepping import Stepping
from moescope.errors import MoescopeError
from moescope.trace.frames import Frame, RecordLevel, TraceEvent


class Session(Stepping):
    """Lanes over one model: a `LoadedModel`, of which only `interpreter` and `facts` are used.

    `models` says of each variant which of two models runs it (`beside.TwoModels`).
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
        models: Sequence[int] = (),
        same_tokens: bool = False,
        shadows: Sequence[str] = (),
    ) -> None:
        super().__init__(model, tokenizer, writer, record, max_context, same_tokens)
        self._slow_router = False
        for expression, which in zip(variants, models or [0] * len(variants), strict=True):
            self.add_lane(expression, model=which)
        if shadows:
            self.set_shadows(shadows)

    def generate(self, request: Generate, *, force_ids: Sequence[int] = ()) -> Iterator[Frame]:
        """Run `request` to its end on every lane, frame by frame. `force_ids` follow the prompt
        in place of drawn tokens."""
        self.start(request, force_ids=force_ids)
        while self.running:
            yield from self.step()

    # --- lanes and variants -----------------------------------------------------------------------

    def add_lane(
        self,
        expression: str,
        fork_of: int | None = None,
        position: int | None = None,
        model: int = 0,
    ) -> int:
        """Open a lane; returns its number. See `protocol.AddLane`."""
        if len(self.lanes) >= MAX_LANES:
            raise MoescopeError(f"at most {MAX_LANES} lanes can be open")
        if fork_of is not None and fork_of not in self.lanes:
            raise MoescopeError(f"lane {letter(fork_of)} is not open")
        model = model if fork_of is None else self.lanes[fork_of].model
        expression, policies = self._policies(expression, self._model(model))
        free = [number for number in range(MAX_LANES) if number not in self.lanes]
        index = next((number for number in free if number not in self._used), free[0])
        lane = Lane(index, expression, policies, model=model)
        if hasattr(self.interpreter, "place"):
            self.interpreter.place(index, model)
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

    def _model(self, model: int) -> Any:
        """The interpreter of the first model, or of the one beside it."""
        models = getattr(self.interpreter, "models", [self.interpreter])
        if not 0 <= model < len(models):
            raise MoescopeError("no checkpoint is open beside this one", hint="--beside MODEL")
        return models[model]

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
        expression, policies = self._policies(expression, self._model(lane.model))
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

    def set_slow_router(self, on: bool) -> None:
        """From the next token on, the slow twin of the router's kernel routes, and the kernel
        beside it; or the kernel again, and how far they were apart is told."""
        twin, kernel = getattr(self.interpreter, "twin", ""), self._kernel
        if not twin:
            raise MoescopeError(f"the router runs in {kernel}, which has no slow twin here")
        apart = self.interpreter.router_difference() if self._slow_router else None
        self.interpreter.use_slow_router(on)
        self._slow_router = on
        first = self.lanes[min(self.lanes)]
        self._tell(TraceEvent("note", {"router": twin if on else kernel}, first.index, first.fed))
        if on:
            self._note(Note(f"{twin} routes now, and {kernel} beside it"))
        elif apart is not None:
            self._note(Note(f"{kernel} routes again; beside {twin}: {apart.line()}"))

    @property
    def router_says(self) -> str:
        """`torch, 6e-08 from native` while the slow twin routes; else ""."""
        if not self._slow_router:
            return ""
        apart = self.interpreter.router_difference()
        others = f", other experts in {apart.other_ids} rows" if apart.other_ids else ""
        return f"{self.interpreter.twin}, {apart.weight:.1g} from {self._kernel}{others}"

    @property
    def _kernel(self) -> str:
        """What routes, in a word."""
        return str(self.interpreter.kernels.get("router", "")).split(",")[0]

    # --- prompts and turns ------------------------------------------------------------------------

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
        self.crossing.close()
        self._note(self.recorder.close())

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
        check_ids(ids, self.interpreter.vocab_size, self.context, self.longest)
        refuse_unlike(getattr(self.interpreter, "unlike", {}), ids)
