"""Decode with vLLM and llama.cpp, where their packages are: nothing is installed for it.

vLLM makes random weights of the same shapes itself. llama.cpp needs a file of the same shapes in
its own format, named by MOESCOPE_GGUF.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cuda_shapes import CONFIGS, begin, parser

PROMPT, TOKENS = 128, 128


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, shape = begin(asked)
    for name, module, measure in (("vllm", "vllm", vllm), ("llama.cpp", "llama_cpp", llama)):
        if find_spec(module) is None:
            report.put(name, {"says": "not installed"})
            continue
        try:
            report.put(name, measure(CONFIGS[shape]))
        except Exception as error:
            report.put(name, {"says": f"{type(error).__name__}: {error}"[:400]})
    report.finish()


def vllm(config: dict[str, Any]) -> dict[str, Any]:
    """Greedy decode of one sequence under its graphs."""
    from vllm import LLM, SamplingParams

    classes = {"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    with tempfile.TemporaryDirectory() as folder:
        named = config | {"architectures": [classes[config["model_type"]]], "dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps(named))
        engine = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, seed=0
        )
        ids = {"prompt_token_ids": list(range(1, PROMPT + 1))}

        def seconds(tokens: int) -> float:
            asked = SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
            )
            began = time.perf_counter()
            engine.generate([ids], asked, use_tqdm=False)
            return time.perf_counter() - began

        seconds(8)
        first = min(seconds(1) for _ in range(3))
        whole = min(seconds(1 + TOKENS) for _ in range(3))
    return {"tokens_per_second": TOKENS / (whole - first), "first_token_seconds": first}


def llama(config: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    if not (path := os.environ.get("MOESCOPE_GGUF")):
        return {"says": "MOESCOPE_GGUF names no file"}
    engine = Llama(path, n_gpu_layers=-1, n_ctx=1024, verbose=False)
    prompt = list(range(1, PROMPT + 1))
    began = time.perf_counter()
    tokens = engine.generate(prompt, temp=0.0)
    next(tokens)
    first = time.perf_counter() - began
    next(tokens)
    began = time.perf_counter()
    for _ in range(TOKENS):
        next(tokens)
    rate = TOKENS / (time.perf_counter() - began)
    return {"tokens_per_second": rate, "first_token_seconds": first}


if __name__ == "__main__":
    main()
