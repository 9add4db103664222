"""Generic wrong specs: for every field that a family may set, what it is turned to.

A comparison with transformers that holds for a wrong spec proves nothing, so each of these must
make it fail wherever it applies. `flips` holds the table; lineages add mutants of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from moescope.engine import decoder, operators
from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.operators import Attention, MoE, RoutedAttention
from moescope.kernels import spec as router_spec
from moescope.kernels.algebra import canonical
from tests.families.kit import Edit, Mutant, on_attention, on_branches, on_moe, on_operators
from tests.oracle.flips import ACTIVATIONS, FLIPS, SCORES, Turn, to

ROUTED = MoE | RoutedAttention
_CLASSES: dict[str, Any] = {
    name: held
    for module in (decoder, operators, router_spec)
    for name, held in vars(module).items()
    if is_dataclass(held)
}


def set_fields(value: Any) -> set[str]:
    """`Class.field` for every field that is off its default, or has none, in a spec."""
    found: set[str] = set()
    for f in fields(value):
        held = getattr(value, f.name)
        if held != f.default:
            found.add(f"{type(value).__name__}.{f.name}")
        for item in held if isinstance(held, tuple) else (held,):
            if is_dataclass(item):
                found |= set_fields(item)
    return found


def matters(name: str, spec: DecoderSpec) -> bool:
    """Whether a field's default would be another spec, and not the same in other words."""
    kind, _, field = name.partition(".")
    default = next(f.default for f in fields(_CLASSES[kind]) if f.name == field)
    return default is MISSING or changes(Mutant(name, turned(name, to(default))), spec, wrong=True)


def turned(name: str, turn: Turn) -> Edit:
    """A field turned wherever it is off its default (or has none)."""
    kind, _, field = name.partition(".")

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if not is_dataclass(value):
            return value
        edits = {}
        for f in fields(value):
            old = getattr(value, f.name)
            here = (type(value).__name__, f.name) == (kind, field)
            new = turn(old) if here and old != f.default else of(old)
            if new is not old and new != old:
                edits[f.name] = new
        return replace(value, **edits) if edits else value

    return of


def _without_shared(moe: MoE) -> MoE:
    wiring = {"shared_experts": 0, "shared_expert_gate": "none", "shared_combination": "add"}
    return replace(moe, shared=None, router=moe.router.with_wiring(**wiring))


def _flip_norm(moe: Any) -> Any:
    flipped = not moe.router.policy.norm_topk_prob
    return replace(moe, router=moe.router.with_policy(norm_topk_prob=flipped))


def _scores(moe: Any) -> Any:
    wrong = SCORES(moe.router.policy.scoring_func)
    edits = {"router_jitter_noise": 0.0} if wrong != "sparsemixer" else {}
    return replace(moe, router=moe.router.with_policy(scoring_func=wrong, **edits))


def _activation(moe: MoE) -> MoE:
    wrong = ACTIVATIONS(moe.experts.activation)
    return replace(moe, experts=replace(moe.experts, activation=wrong))


def _ungrouped(moe: Any) -> Any:
    return replace(moe, router=moe.router.with_policy(n_group=1, topk_group=1))


def _window_in_layer_0(spec: DecoderSpec) -> DecoderSpec:
    """A window where the config has none, and the other way round, in one layer."""
    first = spec.layers[0]
    branches = tuple(
        replace(b, operator=replace(b.operator, window=0 if b.operator.window else 6))
        if isinstance(b.operator, Attention) and not b.operator.chunk
        else b
        for b in first.branches
    )
    return replace(spec, layers=(replace(first, branches=branches), *spec.layers[1:]))


def _rope_everywhere(spec: DecoderSpec) -> DecoderSpec:
    ropes = [b.operator.rope for _, b in spec.operators() if isinstance(b.operator, Attention)]
    first = next((rope for rope in ropes if rope is not None), None)
    return on_attention(lambda a: replace(a, rope=a.rope or first))(spec)


def _half_the_dims(branch: Branch) -> Branch:
    rope = getattr(branch.operator, "rope", None)
    if rope is None or rope.dims % 4 or (rope.scaling and rope.scaling.kind in _OF_ALL_DIMS):
        return branch
    wrong = replace(rope, dims=rope.dims // 2)
    return replace(branch, operator=replace(branch.operator, rope=wrong))


_OF_ALL_DIMS = ("longrope", "proportional")
# Applied to every case that they change; `fields` do not have to be off their default.
_ALWAYS: tuple[tuple[str, Edit, tuple[str, ...]], ...] = (
    ("norm_topk_prob", on_operators(ROUTED, _flip_norm), ("RouterPolicy.norm_topk_prob",)),
    ("other scores", on_operators(ROUTED, _scores), ("RouterPolicy.scoring_func",)),
    ("other activation of the experts", on_moe(_activation), ()),
    ("no shared expert", on_moe(_without_shared), ("MoE.shared", "RouterWiring.shared_experts")),
    (
        "no groups",
        on_operators(ROUTED, _ungrouped),
        ("RouterPolicy.n_group", "RouterPolicy.topk_group"),
    ),
    ("window of layer 0", _window_in_layer_0, ()),
    ("rope in every layer", _rope_everywhere, ()),
    ("half of the dims of a rope", on_branches(_half_the_dims), ("Rope.dims",)),
)
ALWAYS = tuple(Mutant(name, edit, fields) for name, edit, fields in _ALWAYS)
SETS = tuple(
    Mutant(f"{name}: {word}", turned(name, turn), (name,))
    for name, turns in FLIPS.items()
    for word, turn in turns.items()
)
assert not [n for n in FLIPS if n.partition(".")[2] not in _CLASSES[n.partition(".")[0]].__slots__]


def of_case(
    spec: DecoderSpec, case: str, family: str, more: tuple[Mutant, ...]
) -> Iterator[Mutant]:
    """The mutants of a case: generic ones where they apply, and its lineage's."""
    is_set = set_fields(spec)
    for mutant in (*ALWAYS, *SETS, *more):
        if mutant.cases:
            applies = case in mutant.cases
        else:
            applies = mutant in ALWAYS or any(name in is_set for name in mutant.fields)
        if applies and changes(mutant, spec):
            yield mutant


def changes(mutant: Mutant, spec: DecoderSpec, *, wrong: bool = False) -> bool:
    """Whether the wrong spec is one, and not the same in other words; `wrong` if it is none, for
    its fields exclude each other."""
    try:
        return _plain(mutant.edit(spec)) != _plain(spec)
    except ValueError:
        return wrong


def _plain(spec: DecoderSpec) -> DecoderSpec:
    """With each router as the representative of its equals in float32."""

    def of(operator: Any) -> Any:
        return replace(operator, router=canonical(operator.router.resolved("float32")))

    return on_operators(ROUTED, of)(spec)
