"""A decoder's spec under a variant, and what a variant may ask of the decoder around a router.

Specs only: `rewire.py` builds what runs. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.operators import MoE, RoutedAttention
from moescope.variants import Edits, applicable, apply


def facts_of(spec: DecoderSpec, layer: int, branch: Branch) -> frozenset[str]:
    """What `Variant.needs` may ask of the decoder around the router of `branch`."""
    operator = branch.operator
    assert isinstance(operator, MoE | RoutedAttention)
    policy, experts = operator.router.policy, getattr(operator, "experts", None)
    known = {
        "several_routers": len(spec.routers()) > 1,
        "norm_before": branch.pre_norm is not None,
        "scaled": policy.routed_scaling_factor != 1.0,
        "expert_bias": experts is not None and experts.bias,
        "gated_experts": experts is not None and experts.glu,
    }
    return frozenset(name for name, holds in known.items() if holds)


def edited_spec(spec: DecoderSpec, edits: Edits) -> DecoderSpec:
    """`spec` with every router under `edits`, and without the shared experts they drop.

    Raises MoescopeError naming the fields that do not go together.
    """

    def of(layer: int, branch: Branch) -> Branch:
        operator = branch.operator
        if not isinstance(operator, MoE | RoutedAttention):
            return branch
        router = apply(edits, operator.router, layer)
        if isinstance(operator, MoE) and not router.wiring.shared_experts:
            return replace(branch, operator=replace(operator, router=router, shared=None))
        return replace(branch, operator=replace(operator, router=router))

    layers = tuple(
        replace(layer, branches=tuple(of(number, branch) for branch in layer.branches))
        for number, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def layers_of(name: str, spec: DecoderSpec) -> list[int]:
    """The layers in which an entry of the catalogue means something for some router."""
    branches = {(layer, branch.name): branch for layer, branch in spec.operators()}
    return sorted(
        {
            layer
            for layer, branch, router in spec.routers()
            if applicable(name, router, facts_of(spec, layer, branches[layer, branch]))
        }
    )
