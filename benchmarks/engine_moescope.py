"""A child that runs moescope: its public engine, recording to a real file, and the bare loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import child
import numpy as np
from shapes import distinct_experts

from moescope.engine.lane import policies_of
from moescope.engine.load import load_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.recording import Recorder, open_writer, trace_meta
from moescope.engine.session import Session
from moescope.trace.columns import pack
from moescope.trace.fold import columns_of_records
from moescope.trace.frames import Frame
from moescope.trace.output import CHUNK_FRAMES
from moescope.trace.record import record

CONTEXT = 1024
Figures = dict[str, Any]


class Engine:
    """One loaded model; every request is a session of its own."""

    def load(self, folder: str, threads: int) -> Figures:
        import torch

        torch.set_num_threads(threads)
        self.folder = tempfile.TemporaryDirectory(prefix="moescope-bench-")
        began = time.perf_counter()
        self.request = LoadRequest(folder, device="cpu", dtype="bfloat16", max_context=CONTEXT)
        self.model = load_model(self.request)
        seconds = time.perf_counter() - began
        kernels = dict(self.model.interpreter.kernels)
        return {"seconds": seconds, "kernels": kernels, "threads": torch.get_num_threads()}

    def decode(
        self,
        prompt: list[int],
        tokens: int,
        record: str = "weights",  # or off
        variants: tuple[str, ...] = ("trained",),
        shadows: tuple[str, ...] = (),
        same_tokens: bool = False,
    ) -> Figures:
        """A headless run. `first` ends when the first token is drawn, a step when its frames are
        built, handed to the recorder, and the next tokens are drawn."""
        path = Path(self.folder.name) / "run.moetrace"
        writer = None if record == "off" else self._writer(path, record)
        try:
            session = Session(
                self.model,
                None,
                writer,
                record="ids" if record == "off" else record,  # type: ignore[arg-type]
                max_context=CONTEXT,
                variants=tuple(variants),
                same_tokens=same_tokens,
                shadows=shadows,
            )
            request = Generate(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=tokens))
            first, steps, frames = _timed(session, request)
            began = time.perf_counter()
            session.close()
            closing = time.perf_counter() - began
            size = path.stat().st_size if writer is not None else 0
        finally:
            if writer is not None:
                writer.close()
            path.unlink(missing_ok=True)
            self.model.interpreter.set_shadows(())
        ids = [[frame.expert_ids.tolist() for frame in step] for step in frames]
        return {
            "first": first,
            "steps": steps[:-1],  # the last token is fed to be recorded; peers stop before it
            "ids": session.lanes[0].new_ids,
            "distinct": [distinct_experts(step) for step in ids[:-1]],
            "closing": closing,
            "trace_bytes": size,
            "kernels": dict(self.model.interpreter.kernels),
        }

    def alternate(
        self, prompt: list[int], asks: dict[str, Figures], rounds: int, block: int, skip: int
    ) -> Figures:
        """One session whose recording changes every `block` steps: `asks` by name, each once a
        round in an order of its own. `blocks` are the seconds of the steps after the first `skip`,
        `folding` the processor time of folding a trace into chunks, a token's share."""
        paths = {
            name: Path(self.folder.name) / f"{place}.moetrace" for place, name in enumerate(asks)
        }
        recorders = {
            name: Recorder(
                None if ask["record"] == "off" else self._writer(paths[name], ask["record"])
            )
            for name, ask in asks.items()
        }
        session = Session(self.model, None, None, max_context=CONTEXT)
        blocks: dict[str, list[list[float]]] = {name: [] for name in asks}
        held: dict[str, list[Frame]] = {name: [] for name in asks}
        order = np.random.default_rng()
        try:
            for _ in range(rounds):
                for place in order.permutation(len(asks)):
                    name = list(asks)[place]
                    if not session.running or len(session.lanes[0].ids) + block >= session.context:
                        self._prompt(session, prompt)
                    steps = self._block(session, asks[name], recorders[name], block)
                    blocks[name].append([seconds for seconds, _ in steps[skip:]])
                    held[name] += [frame for _, frames in steps for frame in frames]
            session.recorder = Recorder(None)
            session.stop()
            for recorder in recorders.values():
                recorder.close()
            sizes = {n: p.stat().st_size for n, p in paths.items() if p.exists()}
        finally:
            self.model.interpreter.set_shadows(())
            for path in paths.values():
                path.unlink(missing_ok=True)
        return {
            "blocks": blocks,
            "folding": {n: _folding(held[n], asks[n]["record"]) for n in sizes},
            "bytes_a_token": {n: size / len(held[n]) for n, size in sizes.items()},
        }

    def _prompt(self, session: Session, prompt: list[int]) -> None:
        session.recorder = Recorder(None)
        sampling = Sampling(max_new_tokens=CONTEXT)
        session.start(Generate(prompt_ids=tuple(prompt), sampling=sampling))
        while session.prefilling:
            session.step()

    def _block(
        self, session: Session, ask: Figures, recorder: Recorder, steps: int
    ) -> list[tuple[float, list[Frame]]]:
        """Seconds and frames of some steps, recorded as asked."""
        record, shadows = ask["record"], tuple(ask.get("shadows", ()))
        session.recorder = recorder
        session.record = "ids" if record == "off" else record
        if session.shadows != shadows:
            session.set_shadows(shadows)
        found = []
        now = time.perf_counter()
        for _ in range(steps):
            frames = session.step()
            then, now = now, time.perf_counter()
            found.append((now - then, frames))
        if recorder.writer is not None:
            recorder.writer.flush()
        return found

    def bare(self, prompt: list[int], tokens: int) -> Figures:
        """The interpreter and argmax, nothing recorded and nothing told."""
        interpreter = self._emptied()

        def run(ids: list[int]) -> int:
            output = interpreter.run((0,), np.array([ids], np.int64), record="ids")
            return int(output.logits[0, -1].argmax())

        return child.greedy(run, lambda token: run([token]), prompt, tokens)

    def logits(self, prompt: list[int], steps: int) -> Figures:
        """Of the token after the prompt, whose last `steps` tokens are fed one by one."""
        interpreter = self._emptied()
        for part in child.parts(prompt, steps):
            output = interpreter.run((0,), np.array([part], np.int64), record="ids")
        return {"logits": child.packed(output.logits[0, -1])}

    def _emptied(self) -> Any:
        interpreter = self.model.interpreter
        interpreter.open(1, CONTEXT)
        interpreter.truncate(0, 0)
        interpreter.set_policies(0, policies_of("trained", interpreter.routers, interpreter.dtype))
        return interpreter

    def _writer(self, path: Path, record: str) -> Any:
        request = LoadRequest(self.request.model, trace_path=str(path), force=True)
        meta = trace_meta(self.model, record=record)  # type: ignore[arg-type]
        return open_writer(request, meta, private=False)


def _folding(frames: list[Frame], level: Any) -> float:
    blobs = [record(frame, level) for frame in frames][:CHUNK_FRAMES]
    spent = []
    for _ in range(3):
        began = time.thread_time()
        for column in columns_of_records(blobs).values():
            pack(column)
        spent.append(time.thread_time() - began)
    return min(spent) / len(blobs)


def _timed(session: Session, request: Generate) -> tuple[float, list[float], list[list[Frame]]]:
    """Seconds to the first token, of every step after it, and the frames of those steps."""
    began = time.perf_counter()
    session.start(request)
    while session.prefilling:
        session.step()
    now = time.perf_counter()
    first, steps, frames = now - began, [], []
    while session.running:
        frames.append(session.step())
        then, now = now, time.perf_counter()
        steps.append(now - then)
    return first, steps, frames


def main() -> None:
    engine = Engine()
    names = ("load", "decode", "alternate", "bare", "logits")
    child.serve({name: getattr(engine, name) for name in names})


if __name__ == "__main__":
    main()
