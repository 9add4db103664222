"""Command A's Mixture-of-Experts."""

from __future__ import annotations

from typing import Any

from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import Pass
from tests.families.kit import Case, Mutant, replace

TINY: dict[str, dict[str, Any]] = {
    "cohere2_moe": {
        "num_experts": 8,
        "head_dim": 16,
        "num_shared_experts": 2,
        "sliding_window": 7,
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
    }
}
CASES = (
    Case("cohere2_moe", "released", 0),
    Case(
        "cohere2_moe",
        "dense-first",
        2,
        {
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 56,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "shared_expert_combination_strategy": "sum",
            "sliding_window_pattern": 2,
            "attention_bias": True,
            "logit_scale": 1.0,
        },
    ),
    Case(
        "cohere2_moe",
        "sigmoid",
        0,
        {
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
)


def _in_a_row(spec: DecoderSpec) -> DecoderSpec:
    """Experts after attention, not beside it."""
    layers = []
    for layer in spec.layers:
        branches = (b for b in layer.branches if not isinstance(b.operator, Pass))
        in_a_row = tuple(replace(branch, adds_to="residual") for branch in branches)
        layers.append(replace(layer, branches=in_a_row))
    return replace(spec, layers=tuple(layers))


MUTANTS = (Mutant("one after the other", _in_a_row, ("Branch.adds_to", "Branch.reads")),)
