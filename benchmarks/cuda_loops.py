"""Decoding loops that steps time: lanes fed by hand, and a session that records a trace.

Both go on for as long as they are asked to: near the end of the cache they fall back to the prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cuda_shapes import Model, prompt

from moescope.engine.interpreter import Draw, StepOutput
from moescope.engine.lane import policies_of
from moescope.engine.protocol import Generate, Sampling
from moescope.engine.recording import trace_meta
from moescope.engine.sampling import uniform
from moescope.engine.session import Session
from moescope.engine.torch_decoder import TorchDecoder
from moescope.trace.frames import RecordLevel
from moescope.trace.writer import TraceWriter

GREEDY = Sampling(max_new_tokens=1 << 30)  # random weights soon repeat one token; bytes are equal
DRAWN = Sampling(temperature=1.0, max_new_tokens=1 << 30)


class Lanes:
    """N lanes of a decoder, in step. Lane n gets `prompts[n]` and the variant `variants[n]`."""

    def __init__(
        self,
        decoder: TorchDecoder,
        prompts: Sequence[Sequence[int]],
        *,
        variants: Sequence[str] = (),
        record: RecordLevel = "ids",
        sampling: Sampling = GREEDY,
    ) -> None:
        self.decoder, self.record, self.sampling = decoder, record, sampling
        self.prompts = [list(ids) for ids in prompts]
        self.lanes = list(range(len(prompts)))
        self.next = np.zeros((len(prompts), 1), np.int64)
        self.variants = tuple(variants) or ("trained",) * len(prompts)
        self.refill()

    def refill(self) -> None:
        """Every lane back to the end of its prompt, under its variant: others may have had it."""
        decoder = self.decoder
        for lane, ids in enumerate(self.prompts):
            decoder.set_policies(
                lane, policies_of(self.variants[lane], decoder.routers, decoder.dtype)
            )
            decoder.truncate(lane, 0)
            out = decoder.run([lane], np.array([ids]), record="ids")
            self.next[lane] = out.logits[0, -1].argmax()

    def step(self) -> StepOutput:
        decoder = self.decoder
        if max(map(decoder.length, self.lanes)) + 2 >= decoder.shared.capacity:
            self.refill()
        draws = [self.draw(decoder.length(lane) + 1) for lane in self.lanes]
        out = decoder.run(self.lanes, self.next, record=self.record, draws=draws)
        drawn = out.drawn if out.drawn is not None else out.logits[:, -1].argmax(-1)
        self.next = np.asarray(drawn, np.int64).reshape(-1, 1)
        return out

    def draw(self, position: int) -> Draw:
        return Draw(self.sampling, position, uniform(self.sampling.seed, position))

    def go(self, tokens: int) -> None:
        for _ in range(tokens):
            self.step()

    @property
    def position(self) -> int:
        return max(map(self.decoder.length, self.lanes))


class Traced:
    """A session that generates and, where `written`, records a trace into a file of its own."""

    def __init__(
        self,
        model: Model,
        decoder: TorchDecoder,
        record: RecordLevel = "weights",
        *,
        variants: Sequence[str] = ("trained",),
        sampling: Sampling = GREEDY,
        tokens: int = 128,
        written: bool = True,
    ) -> None:
        loaded = model.loaded(decoder)
        self.folder = tempfile.TemporaryDirectory()
        meta = trace_meta(loaded, record=record)
        place = Path(self.folder.name) / "run.moetrace"
        self.writer = TraceWriter(place, meta) if written else None
        self.session = Session(
            loaded,
            writer=self.writer,
            record=record,
            max_context=decoder.shared.capacity,
            variants=variants,
        )
        self.request = Generate(prompt_ids=tuple(prompt(model, tokens)), sampling=sampling)
        self.refill()

    def refill(self) -> None:
        self.session.start(self.request)
        while self.session.prefilling:
            self.session.step()

    def go(self, tokens: int) -> None:
        for _ in range(tokens):
            if not self.session.running:
                self.refill()
            self.session.step()
            self.session.take_events()

    @property
    def position(self) -> int:
        return max(lane.fed for lane in self.session.lanes.values())

    def close(self) -> None:
        self.session.stop()
        self.session.close()
        if self.writer is not None:
            self.writer.close()
        self.folder.cleanup()
