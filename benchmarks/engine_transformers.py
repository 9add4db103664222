"""A child that runs transformers: every implementation of the experts, compiled and not.

A mode is the name of an `experts_implementation`, then `static` (static cache) or `compiled`
(static cache, the decode step through torch.compile; prompts are not compiled, as in `generate`).
Models are called directly, which leaves out what `generate` adds.
"""

from __future__ import annotations

import time
from typing import Any

import child

CONTEXT = 256
Figures = dict[str, Any]


class Engine:
    def load(self, folder: str, threads: int) -> Figures:
        import torch
        import transformers
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self.torch, self.transformers = torch, transformers
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        began = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        seconds = time.perf_counter() - began
        torch._dynamo.config.recompile_limit = 64
        self.held: dict[str, tuple[Any, Any]] = {}  # mode -> static cache and forward
        return {
            "seconds": seconds,
            "version": transformers.__version__,
            "implementations": ["eager", *ALL_EXPERTS_FUNCTIONS.keys()],
            "threads": torch.get_num_threads(),
        }

    def decode(self, mode: str, prompt: list[int], tokens: int) -> Figures:
        with self.torch.inference_mode():
            prefill, step = self._mode(mode)
            return child.greedy(prefill, step, prompt, tokens)

    def logits(self, prompt: list[int], steps: int, mode: str = "grouped_mm") -> Figures:
        self.model.set_experts_implementation(mode)
        cache = self.transformers.DynamicCache(config=self.model.config)
        with self.torch.inference_mode():
            for part in child.parts(prompt, steps):
                out = self.model(self.torch.tensor([part]), past_key_values=cache, use_cache=True)
        return {"logits": child.packed(out.logits[0, -1].float().numpy())}

    def _mode(self, mode: str) -> tuple[Any, Any]:
        torch = self.torch
        experts, _, how = mode.partition(" ")
        self.model.set_experts_implementation(experts)
        config = self.model.config
        cache: Any = self.transformers.DynamicCache(config=config)
        forward: Any = self.model
        if how:
            cache, forward = self._static(mode, how)
        position = torch.zeros((1, 1), dtype=torch.int64)
        fed = torch.zeros((1, 1), dtype=torch.int64)

        def prefill(ids: list[int]) -> int:
            position[0, 0] = len(ids)
            out = self.model(
                torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return int(out.logits[0, -1].argmax())

        def step(token: int) -> int:
            fed[0, 0] = token
            out = forward(
                fed,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            position.add_(1)
            return int(out.logits[0, -1].argmax())

        return prefill, step

    def _static(self, mode: str, how: str) -> tuple[Any, Any]:
        """One cache per mode, emptied: compiled code holds on to it."""
        if mode not in self.held:
            cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=CONTEXT)
            call = self.model.__call__
            forward = self.torch.compile(call, dynamic=False) if how == "compiled" else call
            self.held[mode] = cache, forward
        self.held[mode][0].reset()
        return self.held[mode]


def main() -> None:
    engine = Engine()
    child.serve({name: getattr(engine, name) for name in ("load", "decode", "logits")})


if __name__ == "__main__":
    main()
