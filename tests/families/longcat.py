"""LongCat-Flash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moescope.engine.decoder import DecoderSpec, Layer
from tests.families.deepseek import LATENT
from tests.families.kit import Case, Mutant

TINY: dict[str, dict[str, Any]] = {
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 40,
        "routed_scaling_factor": 1.5,
    },
}
CASES = (
    Case("longcat_flash", "released", 0),
    Case("longcat_flash", "all-real", 0, {"zero_expert_num": 0, "attention_bias": True}),
)


def _no_shortcut(spec: DecoderSpec) -> DecoderSpec:
    """What the experts give is there for the second attention already."""
    layers = []
    for layer in spec.layers:
        *branches, _ = layer.branches
        layers.append(
            Layer(tuple(replace(b, adds_to="residual") if b.name == "moe" else b for b in branches))
        )
    return replace(spec, layers=tuple(layers))


MUTANTS = (Mutant("no shortcut", _no_shortcut, ("Branch.adds_to",), tuple(c.id for c in CASES)),)
EXEMPT = {("longcat_flash", "fused"): "in memory, experts that compute nothing have tensors too"}
