"""The step of a session: what is pending in the running lanes is fed as one batch, a frame is built
for every token fed, and the next ones are drawn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine import sampling
from moescope.engine.framing import frame_of
from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.lane import Lane
from moescope.engine.lanes import Lanes
from moescope.engine.sampling import Expectation
from moescope.trace.frames import Frame

CHUNK = 128  # tokens of a prompt fed at once: pause, stop and progress wait no longer than that
LOGITS_BYTES = 96 << 20  # next-token logits of one chunk, which a large vocabulary makes the limit


class Stepping(Lanes):
    """Feeds lanes. Every token of a lane is fed and has a frame, the last one too."""

    def step(self) -> list[Frame]:
        """Feed one batch; returns its frames, those of one lane together. [] when nothing runs."""
        lanes, width = self._batch()
        if not lanes:
            return []
        began = time.monotonic()
        prefill = lanes[0].fed < lanes[0].start
        ids = np.array([lane.ids[lane.fed : lane.fed + width] for lane in lanes], np.int64)
        wanted = self.same_tokens or self.crosses
        self.crossing.prepare(self.lanes, self._runner, wanted)
        output = self.interpreter.run(
            [lane.index for lane in lanes],
            ids,
            all_logits=width > 1,
            record=self.record,
            draws=self._draws(lanes) if width == 1 else None,
            **self._following(lanes, width),
        )
        frames: list[Frame] = []
        first: dict[int, Expectation] = {}  # of lane 0 by position, what KL is taken against
        for row, lane in enumerate(lanes):
            frames += self._absorb(lane, output, row, width, first)
        self._note(self.recorder.send())
        for event in self.crossing.take(frames, lambda lane: self.lanes[lane].like_first):
            self._tell(event)
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

    def _following(self, lanes: Sequence[Lane], width: int) -> dict[str, Any]:
        """The ids after those of a prompt, for an interpreter that keeps no logits of a prompt.
        Lanes beside each other are compared by whole rows, so theirs are kept."""
        if width == 1 or len(lanes) > 1 or not getattr(self.interpreter, "expects", False):
            return {}
        lane = lanes[0]
        after = lane.ids[lane.fed + 1 : lane.fed + width + 1]
        return {"next_ids": np.array([after + [-1] * (width - len(after))], np.int64)}

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
        if lane.expected is not None and output.logits.shape[1] > 1:  # a view of the whole chunk
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

    def _same_as_first(self, position: int, token: int) -> bool:
        first = self.lanes.get(0)
        return first is not None and position < len(first.ids) and first.ids[position] == token

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
