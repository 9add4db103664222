"""A child that decodes short models of real shapes on one set of random weights: with the C step,
and on the torch operators alone.

Tokens alternate between the two, and a turn gives the medians of both, so that a drift of the
machine is shared.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import child
import numpy as np

Figures = dict[str, Any]


class Families:
    def load(self, threads: int) -> Figures:
        import torch

        torch.set_num_threads(threads)
        return {"threads": torch.get_num_threads()}

    def case(self, config: Figures, prompt: int, tokens: int) -> Figures:
        """Make the weights and both decoders, and read a prompt; says what runs where."""
        import torch

        from moescope.engine import families, parameters
        from moescope.engine.torch_decoder import TorchDecoder

        spec = families.build(config, "bfloat16")
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for slot in parameters.slots(spec):
            dtype = torch.float32 if slot.dtype == "float32" else torch.bfloat16
            if len(slot.shape) == 1:
                weights[slot.name] = torch.full(slot.shape, 1.0 if "norm" in slot.name else 0.01)
                weights[slot.name] = weights[slot.name].to(dtype)
            else:
                empty = torch.empty(slot.shape, dtype=dtype)
                weights[slot.name] = empty.normal_(0.0, 0.02, generator=generator)
        self.models = [
            TorchDecoder(spec, weights, device="cpu", dtype="bfloat16", fused=fused)
            for fused in (True, False)
        ]
        ids = np.random.default_rng(128).integers(0, spec.vocab_size, (1, prompt + tokens))
        self.prompt, self.ids = prompt, ids
        for model in self.models:
            model.open(1, prompt + tokens)
            model.run([0], ids[:, :prompt])
        return {
            "step": self.models[0].kernels["step"],
            "gb_read": 2e-9 * parameters.count_active(spec),
            "torch": self.models[1].kernels["step"],
        }

    def time(self, tokens: int, skip: int) -> Figures:
        """Decode after the prompt, one token with each in turn."""
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(tokens):
            token = self.ids[:, self.prompt + number, None]
            for model, spent in zip(self.models, seconds, strict=True):
                began = time.perf_counter()
                model.run([0], token)
                if number >= skip:
                    spent.append(time.perf_counter() - began)
        for model in self.models:
            model.truncate(0, self.prompt)
        step, plain = (1e3 * statistics.median(spent) for spent in seconds)
        pairs = zip(*seconds, strict=True)
        return {
            "step_ms": step,
            "torch_ms": plain,
            "faster": statistics.median(slow / fast for fast, slow in pairs),
        }


if __name__ == "__main__":
    engine = Families()
    child.serve({"load": engine.load, "case": engine.case, "time": engine.time})
