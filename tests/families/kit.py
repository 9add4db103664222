"""What a lineage's test module is written in: cases, mutants, and how routers are listened to.

Imports no torch, so that tables load fast. Generic mutants are `tests.oracle.mutants`' affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.operators import Attention, MoE

Edit = Callable[[DecoderSpec], DecoderSpec]


@dataclass(frozen=True, eq=False)
class Case:
    """One tiny checkpoint. The seed is searched (`python -m tests.oracle.harness FAMILY`), so that
    no greedy choice and no selection of experts lies within rounding."""

    family: str
    name: str
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


@dataclass(frozen=True, eq=False)
class Mutant:
    """A spec that is wrong in one way; `fields` (`Class.field`) are what this shows to matter.

    `cases` says where it is applied; without them, wherever one of its fields is off its default
    and the edit changes the spec. `moves` renames tensors (ours: from, to) where the wrong spec
    calls them otherwise.
    """

    name: str
    edit: Edit
    fields: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()


# (module, positional inputs, output) -> router logits [T, E], weights [T, K], ids [T, K]
Listen = Callable[[Any, tuple[Any, ...], Any], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Read:
    """The router modules of a family in transformers: a pattern of class names that is searched
    for, and what a call of one decided."""

    modules: str
    listen: Listen


TOP_K = Read(r"(TopK|Topk|TokenChoice)Router$", lambda module, inputs, output: tuple(output[:3]))
# (name, tensor, noise of its shape) -> what it shall hold, or None for the usual
Init = Callable[[str, Any, Any], Any]


def merged(tables: Mapping[str, Any] | None, others: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables of different keys as one."""
    both = dict(tables or {})
    assert not set(both) & set(others), set(both) & set(others)
    return both | dict(others)


# --- edits ---------------------------------------------------------------------------------------


def on_branches(change: Callable[[Branch], Branch]) -> Edit:
    def edit(spec: DecoderSpec) -> DecoderSpec:
        layers = (
            replace(layer, branches=tuple(map(change, layer.branches))) for layer in spec.layers
        )
        return replace(spec, layers=tuple(layers))

    return edit


def on_operators(kind: Any, change: Callable[[Any], Any]) -> Edit:
    def one(branch: Branch) -> Branch:
        if isinstance(branch.operator, kind):
            return replace(branch, operator=change(branch.operator))
        return branch

    return on_branches(one)


def on_attention(change: Callable[[Attention], Attention]) -> Edit:
    return on_operators(Attention, change)


def on_moe(change: Callable[[MoE], MoE]) -> Edit:
    return on_operators(MoE, change)


def policy(**edits: Any) -> Edit:
    return on_moe(lambda moe: replace(moe, router=moe.router.with_policy(**edits)))


def wiring(**edits: Any) -> Edit:
    return on_moe(lambda moe: replace(moe, router=moe.router.with_wiring(**edits)))
