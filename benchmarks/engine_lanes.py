"""A child that decodes with several numbers of lanes by turns: sessions side by side, each with a
decoder and caches of its own, over the weights of one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child
import numpy as np
from engine_moescope import Engine, Figures
from shapes import distinct_experts

from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.recording import open_writer, trace_meta
from moescope.engine.session import Session
from moescope.engine.torch_decoder import TorchDecoder


class Lanes(Engine):
    def alternate_lanes(
        self,
        prompt: list[int],
        asks: Mapping[str, Figures],  # name -> variants, same_tokens
        rounds: int,
        block: int,
        skip: int,
    ) -> Figures:
        """Every session takes `block` steps a round, in an order drawn anew. Of each block: the
        median step after the first `skip`, and the distinct experts of those steps."""
        tokens = rounds * block + 1
        sessions = {name: self._beside(name, ask, prompt, tokens) for name, ask in asks.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in asks}
        names, order = list(asks), np.random.default_rng()
        for _ in range(rounds):
            for place in order.permutation(len(names)):
                found[names[place]].append(_block(sessions[names[place]], block, skip))
        lengths = {name: session.lanes[0].fed for name, session in sessions.items()}
        for session in sessions.values():
            session.close()
        return {
            "steps": {name: [step for step, _ in blocks] for name, blocks in found.items()},
            "distinct": {
                name: statistics.mean(count for _, count in blocks)
                for name, blocks in found.items()
            },
            "tokens": (len(prompt) + lengths[names[0]]) / 2,  # held in a lane's cache, on average
        }

    def _beside(self, name: str, ask: Figures, prompt: list[int], tokens: int) -> Session:
        """A session that has read its prompt, recording what every command records."""
        loaded = self.model.interpreter
        decoder = TorchDecoder(
            loaded.spec, loaded.shared.weights, device=loaded.device, dtype=loaded.dtype
        )
        model: Any = SimpleNamespace(interpreter=decoder, facts=self.model.facts)
        path = Path(self.folder.name) / f"{name}.moetrace"
        request = LoadRequest(self.request.model, trace_path=str(path), force=True)
        session = Session(
            model,
            None,
            open_writer(request, trace_meta(model), private=False),
            variants=tuple(ask["variants"]),
            same_tokens=ask.get("same_tokens", False),
        )
        sampling = Sampling(max_new_tokens=tokens)
        session.start(Generate(prompt_ids=tuple(prompt), sampling=sampling))
        while session.prefilling:
            session.step()
        return session


def _block(session: Session, steps: int, skip: int) -> tuple[float, float]:
    seconds, distinct = [], []
    now = time.perf_counter()
    for _ in range(steps):
        frames = session.step()
        then, now = now, time.perf_counter()
        seconds.append(now - then)
        distinct.append(distinct_experts([frame.expert_ids.tolist() for frame in frames]))
        now = time.perf_counter()
    return statistics.median(seconds[skip:]), statistics.mean(distinct[skip:])


def main() -> None:
    engine = Lanes()
    child.serve({name: getattr(engine, name) for name in ("load", "alternate_lanes")})


if __name__ == "__main__":
    main()
