"""Which entries of the catalogue mean something for a model, and the expressions that say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from moescope.engine.decoder import DecoderSpec
from moescope.engine.edited import layers_of
from moescope.kernels.spec import RouterSpec
from moescope.variants import CATALOGUE, EXECUTABLE, Edits, apply, parse

# Decoder edits that act on the logits, or on what they are made of.
BEFORE_ROUTING = frozenset(
    {
        "first_where_all_negative",
        "softplus_as_written",
        "best_of_each_group",
        "gate_rows_shifted",
        "gate_rows_reversed",
        "gate_of_next_router",
        "gate_of_previous_router",
        "gate_reads_embedding",
        "bias_bytes_as_bfloat16",
    }
)
_BEFORE_POLICY = ("gate_quant_bits",)
_BEFORE_WIRING = ("router_input", "gate_bias", "router_dtype")


@dataclass(frozen=True)
class Hypothesis:
    """One or two entries of the catalogue, in the layers where they mean something."""

    names: tuple[str, ...]  # () is the trained router
    expression: str

    @cached_property
    def edits(self) -> Edits:
        return parse(self.expression)

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(CATALOGUE[name].reported for name in self.names)

    def changes_logits(self, spec: RouterSpec, layer: int) -> bool:
        """Whether the logits of this router are others, given the same input to its layer."""
        if BEFORE_ROUTING & set(self.edits.decoder_at(layer)):
            return True
        other = apply(self.edits, spec, layer)
        return any(
            getattr(other.policy, name) != getattr(spec.policy, name) for name in _BEFORE_POLICY
        ) or any(
            getattr(other.wiring, name) != getattr(spec.wiring, name) for name in _BEFORE_WIRING
        )

    def rounds_in_vain(self, routers: Sequence[Any]) -> bool:
        """Whether it only rounds what these routers round already. Specs are an engine's."""
        if self.edits.decoder:
            return False
        return all(apply(self.edits, r.spec, r.layer).equal(r.spec) for r in routers)

    def __and__(self, other: Hypothesis) -> Hypothesis:
        return Hypothesis(
            (*self.names, *other.names), str(parse(f"{self.expression}/{other.expression}"))
        )


TRAINED = Hypothesis((), "trained")


@lru_cache(maxsize=16)
def singles(spec: DecoderSpec) -> tuple[Hypothesis, ...]:
    """Every executable entry that applies to some router of the model, in catalogue order."""
    return tuple(Hypothesis((name,), expression) for name, expression in _applicable(spec))


def _applicable(spec: DecoderSpec) -> Iterator[tuple[str, str]]:
    routed = {layer for layer, _, _ in spec.routers()}
    for name in EXECUTABLE:
        held = [] if name == "trained" else layers_of(name, spec)
        if set(held) == routed:
            yield name, name
        elif held:
            yield name, str(parse(f"{name}@{'+'.join(map(str, held))}"))


def pairs(best: Sequence[Hypothesis], routers: Sequence[Any]) -> list[Hypothesis]:
    """Two at a time, where the two together mean something and are more than either."""
    found = []
    for n, first in enumerate(best):
        for second in best[n + 1 :]:
            both = first & second
            if _means_something(both, first, second, routers):
                found.append(both)
    return found


def _means_something(
    both: Hypothesis, first: Hypothesis, second: Hypothesis, routers: Sequence[Any]
) -> bool:
    from moescope.errors import MoescopeError

    def specs(hypothesis: Hypothesis) -> tuple[Any, ...]:
        edits = hypothesis.edits
        return tuple(
            (apply(edits, router.spec, router.layer), edits.decoder_at(router.layer))
            for router in routers
        )

    try:
        joined = specs(both)
    except MoescopeError:
        return False
    return joined != specs(first) and joined != specs(second)
