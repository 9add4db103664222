"""The shapes every engine is given, and the model of bytes that a decode step must read.

Batch-1 decode reads every active weight once: S bytes that all tokens share (attention, routers,
output head) and e bytes for each distinct expert. Norms and embedding rows are left out, and the
cache of one lane, which is about 1 %, so that shares of the bandwidth are a little understated,
never overstated; where lanes are compared, each one's cache counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shapes:
    """OLMoE-1B-7B, whose real depth is 16 layers."""

    layers: int = 4
    hidden: int = 2048
    heads: int = 16
    experts: int = 64
    top_k: int = 8
    width: int = 1024
    vocab: int = 50304
    context: int = 4096
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def shared(self) -> int:
        """Parameters every token reads."""
        layer = 4 * self.hidden * self.hidden + self.experts * self.hidden
        return self.layers * layer + self.vocab * self.hidden

    @property
    def expert(self) -> int:
        """Parameters of one expert of one layer."""
        return 3 * self.hidden * self.width

    @property
    def active(self) -> int:
        """Parameters one token reads."""
        return self.shared + self.layers * self.top_k * self.expert

    @property
    def parameters(self) -> int:
        norms = self.layers * 4 * self.hidden + self.hidden
        tables = self.vocab * self.hidden
        return self.shared + tables + self.layers * self.experts * self.expert + norms

    def token_bytes(self, item: int = 2) -> int:
        """What one decoded token must read, in bytes of `item` bytes a parameter."""
        return item * self.active

    def bound(self, distinct: float, lanes: int = 1, held: float = 0.0) -> float:
        """(S + e·U + N·c) / (S + e·K + c): the bytes of a step over those of one lane, where
        `distinct` experts a layer are read, and each lane holds `held` tokens."""
        cache = 2 * self.layers * self.hidden * held
        union = self.shared + self.layers * distinct * self.expert
        return (union + lanes * cache) / (self.active + cache)

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and moescope read it."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "clip_qkv": None,
            "eos_token_id": None,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "max_position_embeddings": self.context,
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "pad_token_id": None,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        }


def distinct_experts(ids: Sequence[Sequence[Sequence[int]]]) -> float:
    """Distinct experts a layer, averaged over layers. `ids` is [lanes, layers, K]; -1 is none."""
    layers = list(zip(*ids, strict=True))
    counts = [len({i for lane in layer for i in lane if i >= 0}) for layer in layers]
    return sum(counts) / len(counts)
