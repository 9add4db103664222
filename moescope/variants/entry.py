"""What an entry of the catalogue is: a fault somebody shipped, as edits of a router and around it.

Data only. Names of faults and what they leave behind come from the threads each entry cites.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Observed = Literal["routing", "downstream", "none"]


@dataclass(frozen=True, slots=True)
class By:
    """An edit relative to the present value."""

    amount: int


@dataclass(frozen=True, slots=True)
class Signature:
    """What a fault does to the decisions of a layer whose input is right, in words.

    `ids` and `order`: `same`, `other`, or `near ties` (only where the choice was close). `weights`
    and `score_sum` likewise, or what becomes of them.
    """

    ids: str = "same"
    order: str = "same"
    weights: str = "same"
    score_sum: str = "same"

    def __str__(self) -> str:
        return f"ids {self.ids}, order {self.order}, weights {self.weights}, Σ {self.score_sum}"


SAME = Signature()


@dataclass(frozen=True, slots=True)
class Variant:
    """One entry. Edits are `policy` and `wiring` fields of the spec (a mapping as a value turns
    present values into new ones and leaves others alone), and names of `DECODER_EDITS`.

    It makes sense where the present values of `requires` are among those named and the decoder has
    all of `needs` (see `engine.rewire.facts_of`). `fault` is the name it is reported under, where
    several entries are forms of one fault. `seen`: `routing` in the decisions of the first layer
    with a router; `downstream` only in the layers after it; `none`: never by routing, so it is
    listed and not diagnosed.
    """

    name: str
    title: str
    summary: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    wiring: Mapping[str, Any] = field(default_factory=dict)
    decoder: tuple[str, ...] = ()
    layers: tuple[tuple[int, int], ...] | None = None
    evidence: str = ""
    requires: Mapping[str, Container[Any]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    fault: str = ""
    seen: Observed = "routing"
    signature: Signature = SAME
    fix: str = ""

    @property
    def reported(self) -> str:
        """The name of the fault."""
        return self.fault or self.name

    @property
    def rebuilds(self) -> bool:
        """Whether it edits more than the policy, so that a step must be built anew."""
        return bool(self.wiring or self.decoder)

    @property
    def links(self) -> tuple[str, ...]:
        """Addresses of the threads that `evidence` names; GitHub leads from issue to pull."""
        cited = re.sub(r" \([^)]*\)", "", self.evidence)
        return tuple(
            f"https://github.com/{REPOSITORIES[name]}/issues/{number}"
            for name, numbers in _CITED.findall(cited)
            if name in REPOSITORIES
            for number in re.findall(r"#(\d+)", numbers)
        )


_CITED = re.compile(r"([A-Za-z][\w./-]*(?: Automodel)?) ((?:#\d+(?:, (?=#))?)+)")
# How threads are cited, and where they are.
REPOSITORIES: dict[str, str] = {
    "lablup/mlxcel": "lablup/mlxcel",
    "tinygrad": "tinygrad/tinygrad",
    "vllm-gaudi": "vllm-project/vllm-gaudi",
    "HabanaAI/vllm-fork": "HabanaAI/vllm-fork",
    "torchtitan": "pytorch/torchtitan",
    "NousResearch/torchtitan": "NousResearch/torchtitan",
    "Megatron-LM": "NVIDIA/Megatron-LM",
    "flashinfer": "flashinfer-ai/flashinfer",
    "SGLang": "sgl-project/sglang",
    "sglang-jax": "sgl-project/sglang-jax",
    "vLLM": "vllm-project/vllm",
    "transformers": "huggingface/transformers",
    "mlx-lm": "ml-explore/mlx-lm",
    "mlx-swift-lm": "ml-explore/mlx-swift-lm",
    "llama.cpp": "ggml-org/llama.cpp",
    "ik_llama.cpp": "ikawrakow/ik_llama.cpp",
    "TensorRT-LLM": "NVIDIA/TensorRT-LLM",
    "NeMo Automodel": "NVIDIA-NeMo/Automodel",
    "VeOmni": "ByteDance-Seed/VeOmni",
    "prime-rl": "PrimeIntellect-ai/prime-rl",
    "DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
    "mistral.rs": "EricLBuehler/mistral.rs",
    "ferrox": "antonellof/ferrox",
    "larql": "chrishayuk/larql",
    "MoLE": "JieShibo/MoLE",
    "lmdeploy": "InternLM/lmdeploy",
    "llm-compressor": "vllm-project/llm-compressor",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "vllm-omni": "vllm-project/vllm-omni",
    "minimind": "jingyaogong/minimind",
    "megablocks": "databricks/megablocks",
}
