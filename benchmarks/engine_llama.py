"""A child that runs llama.cpp through llama-cpp-python's bindings of the C interface.

Weights are read, not mapped (`no mmap` was the faster here); logits only of the last token; both
settings of flash attention, each a context of its own on the same weights.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import child
import numpy as np
from numpy.typing import NDArray

CONTEXT = 1024
MODES = {"flash attention": 1, "no flash attention": 0}
Figures = dict[str, Any]


class Engine:
    def load(self, file: str, threads: int) -> Figures:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        _without_mmap(llama_cpp, params)
        began = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise child.Unavailable("llama.cpp does not load the file")
        seconds = time.perf_counter() - began
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.contexts = {name: self._context(flash, threads) for name, flash in MODES.items()}
        info = llama_cpp.llama_print_system_info().decode()
        return {
            "seconds": seconds,
            "version": llama_cpp.__version__,
            "modes": list(MODES),
            "threads": threads,
            "system": " ".join(part.strip() for part in info.split("|") if "= 1" in part),
        }

    def _context(self, flash: int, threads: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.no_perf = True
        return self.lib.llama_init_from_model(self.model, params)

    def decode(self, mode: str, prompt: list[int], tokens: int) -> Figures:
        context = self._emptied(mode)

        def run(ids: list[int]) -> int:
            return int(self._run(context, ids).argmax())

        return child.greedy(run, lambda token: run([token]), prompt, tokens)

    def logits(self, prompt: list[int], steps: int, mode: str = "flash attention") -> Figures:
        context = self._emptied(mode)
        for part in child.parts(prompt, steps):
            row = self._run(context, part)
        return {"logits": child.packed(row)}

    def _emptied(self, mode: str) -> Any:
        context = self.contexts[mode]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        return context

    def _run(self, context: Any, ids: list[int]) -> NDArray[np.float32]:
        """Feed ids after what the context holds; the logits of the last, a view."""
        tokens = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise child.Unavailable("llama_decode failed")
        row = self.lib.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(row, shape=(self.vocab,))


def _without_mmap(lib: Any, params: Any) -> None:
    """Older bindings say use_mmap, newer ones load_mode."""
    if hasattr(params, "load_mode"):
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    else:
        params.use_mmap = False


def _silent(lib: Any) -> Any:
    """Kept for as long as the process lives: the library holds only its address."""
    global _callback
    _callback = lib.llama_log_callback(lambda level, text, data: None)
    if os.environ.get("BENCH_DEBUG"):
        _callback = lib.llama_log_callback(lambda level, text, data: print(text.decode(), end=""))
    return _callback


def main() -> None:
    engine = Engine()
    child.serve({name: getattr(engine, name) for name in ("load", "decode", "logits")})


if __name__ == "__main__":
    main()
