"""Which fields of a `DecoderSpec` a program honours, as tables, and the first that it does not.

A field that is not in a table is honoured. Imports no torch: the table here says what the torch
interpreter runs; `native_limits` says what the C step does. The CUDA graph holds all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    GateNetwork,
    LinearAttention,
    MoE,
    Pass,
    RoutedAttention,
    ShortConv,
    StateSpace,
)
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterWiring


@dataclass(frozen=True, slots=True)
class Limits:
    """`only`: fields that must keep their default, or hold a value named there."""

    operators: tuple[type, ...]
    only: Mapping[type, Mapping[str, tuple[Any, ...]]]

    def first(self, spec: DecoderSpec) -> tuple[str, Any] | None:
        """(`Class.field`, its value) of the first thing in `spec` that is not covered."""
        return next(self._misfits(spec), None)

    def _misfits(self, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        only = self.only.get(kind, {})
        if isinstance(value, Branch) and not isinstance(value.operator, self.operators):
            yield "Branch.operator", type(value.operator).__name__
        for f in fields(value):
            held = getattr(value, f.name)
            if f.name in only and held != f.default and held not in only[f.name]:
                yield f"{kind.__name__}.{f.name}", held
            for item in held if isinstance(held, tuple) else (held,):
                if hasattr(item, "__dataclass_fields__"):
                    yield from self._misfits(item)


def honouring(
    operators: tuple[type, ...],
    honoured: Mapping[type, str],
    words: Mapping[tuple[type, str], str],
) -> Limits:
    """Limits told by what is honoured: of each class the fields, and of a field some values, both
    as words with spaces between. A field that nobody names is not covered, so a new one is not."""

    def only(kind: type, names: str) -> dict[str, tuple[Any, ...]]:
        known = names.split()
        others: dict[str, tuple[Any, ...]] = {
            f.name: () for f in fields(kind) if f.name not in known
        }
        some = {name: tuple(text.split()) for (of, name), text in words.items() if of is kind}
        return {**others, **some}

    return Limits(operators, {kind: only(kind, names) for kind, names in honoured.items()})


TORCH = Limits(
    (
        Attention,
        ConvolvedAttention,
        MLA,
        MLP,
        MoE,
        Pass,
        LinearAttention,
        RoutedAttention,
        ShortConv,
        StateSpace,
    ),
    {
        LinearAttention: {"kind": ("gated_delta", "kda")},
        GateNetwork: {"activation": ("silu", "gelu", "gelu_tanh", "relu2")},
        Attention: {"shares_kv_of": ()},
        RouterWiring: {
            "router_input": ("normed", "residual", "residual_rms_scaled", "carried_mlp"),
            "hash_table": (),
            "shared_combination": ("add", "average"),
            "expert_pre_norm": (),
            "expert_post_norm": (),
        },
    },
)


def refuse_unsupported(spec: DecoderSpec) -> None:
    """Raise a MoescopeError for the first thing that the torch interpreter does not do."""
    if (found := TORCH.first(spec)) is not None:
        name, value = found
        raise MoescopeError(
            f"{name} {value}: not implemented by the torch interpreter of this version",
            code=ExitCode.CHECKPOINT,
        )
