"""A child that runs mlx-lm on the CPU: bfloat16 where MLX can, else float32 of the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import child

Figures = dict[str, Any]


class Engine:
    def load(self, folder: str, dtype: str) -> Figures:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        self.mx, self.make_cache = mx, make_prompt_cache
        began = time.perf_counter()
        self.model, _ = load_model(Path(folder), lazy=True)
        self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "version": mlx_lm.__version__, "mlx": mx.__version__}

    def decode(self, prompt: list[int], tokens: int) -> Figures:
        cache = self.make_cache(self.model)

        def run(ids: list[int]) -> int:
            logits = self.model(self.mx.array([ids]), cache=cache)[0, -1]
            return int(self.mx.argmax(logits).item())

        return child.greedy(run, lambda token: run([token]), prompt, tokens)


def main() -> None:
    engine = Engine()
    child.serve({name: getattr(engine, name) for name in ("load", "decode")})


if __name__ == "__main__":
    main()
