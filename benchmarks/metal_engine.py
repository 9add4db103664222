"""A child of `metal_decode.py`: moescope with its trace written, or mlx-lm, alone in a process, so
that the peak of MLX's memory is its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child
import mlx.core as mx

Figures = dict[str, Any]
CONTEXT = 2048


class Engine:
    def load(self, engine: str, folder: str, dtype: str) -> Figures:
        mx.reset_peak_memory()
        began = time.perf_counter()
        self.made = tempfile.TemporaryDirectory(prefix="moescope-bench-")
        self.stream = {"moescope": self._moescope, "mlx-lm": self._mlx_lm}[engine](folder, dtype)
        return {"seconds": time.perf_counter() - began, **self.facts}

    def decode(self, prompt: list[int], tokens: int) -> Figures:
        """Seconds to the first token and of each that follows; the peak since the last call."""
        stream = self.stream(prompt, tokens)
        next(stream)
        began = now = time.perf_counter()
        first, steps, ids = 0.0, [], []
        for token in stream:
            then, now = now, time.perf_counter()
            if ids:
                steps.append(now - then)
            else:
                first = now - began
            ids.append(token)
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return {"first": first, "steps": steps, "ids": ids, "peak": peak}

    def _moescope(self, folder: str, dtype: str) -> Any:
        from moescope.engine import recording
        from moescope.engine.load import load_model
        from moescope.engine.protocol import Generate, LoadRequest, Sampling
        from moescope.engine.session import Session

        trace = Path(self.made.name) / "run.moetrace"
        request = LoadRequest(
            folder,
            device="mlx",
            dtype=dtype,
            max_context=CONTEXT,
            trace_path=str(trace),
            force=True,
        )
        model = load_model(request)
        self.facts = {"kernels": dict(model.interpreter.kernels)}

        def stream(prompt: list[int], tokens: int) -> Iterator[int]:
            """A token is yielded when it was drawn, as mlx-lm yields it; before the first, when
            the prompt is about to be read, -1."""
            trace.unlink(missing_ok=True)
            meta = recording.trace_meta(model, None, record="weights", redact=False)
            writer = recording.open_writer(request, meta, False)
            session = Session(model, None, writer, max_context=CONTEXT)
            sampling = Sampling(max_new_tokens=tokens)
            yield -1
            session.start(Generate(prompt_ids=tuple(prompt), sampling=sampling))
            told = 0
            while session.running and told < tokens:
                session.step()
                drawn = session.lanes[0].new_ids
                yield from drawn[told:]
                told = len(drawn)
            session.stop()
            session.close()

        return stream

    def _mlx_lm(self, folder: str, dtype: str) -> Any:
        import mlx_lm
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        model, _ = load_model(Path(folder))
        self.facts = {"version": mlx_lm.__version__}

        def stream(prompt: list[int], tokens: int) -> Iterator[int]:
            yield -1
            for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
                yield int(token)

        return stream


def main() -> None:
    engine = Engine()
    child.serve({"load": engine.load, "decode": engine.decode})


if __name__ == "__main__":
    main()
