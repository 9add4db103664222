"""Steering a lane: experts that are forbidden, forced, scaled, or left out below a threshold.

A lane expression is a variant expression, then ` with ` and steering items separated by commas:

    trained with forbid=L12:3        expert 3 of layer 12 cannot be chosen
    trained with force=3+5           in every layer, experts 3 and 5 are always among the chosen
    top_k+1 with scale=L0-3:7*0.5    expert 7 of layers 0 to 3 counts half
    trained with min_p=0.2           experts that score below 0.2 of the best are left out

What it means: `forbid` and `force` act on the *choice* alone. The scores stay what the gate gave,
and weights are made of them as the variant says; so without renormalisation Σ falls when a good
expert is forbidden, and a forced one counts as little as it scored. `scale` multiplies the weight
afterwards. `min_p` leaves out chosen experts (id -1, weight 0) and, where weights are normalised,
shares theirs among the rest. A trace records what was executed: ids, weights and Σ after steering.

Data and its parser only; `engine/torch_steering.py` executes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterSpec

WORD = " with "
MAX_ITEMS = 64
MAX_LENGTH = 1000
HINT = "trained with forbid=L12:3   force=3+5   scale=L0-3:7*0.5   min_p=0.2"
_WITH = re.compile(r"(?:^|\s)with\s")
_NUMBER = r"(?:\d{1,6}(?:\.\d{0,9})?|\.\d{1,9})"
_SPAN = r"\d{1,5}(?:-\d{1,5})?(?:\+\d{1,5}(?:-\d{1,5})?)*"
_PLACE = re.compile(rf"(?:L({_SPAN}):)?({_SPAN})")
_SCALE = re.compile(rf"(?:L({_SPAN}):)?({_SPAN})\*({_NUMBER})")
_MIN_P = re.compile(rf"(?:L({_SPAN}):)?({_NUMBER})")
_PATTERNS = {"forbid": _PLACE, "force": _PLACE, "scale": _SCALE, "min_p": _MIN_P}

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One edit. `layers` None: all. `value`: the factor of `scale`, the threshold of `min_p`."""

    kind: str  # forbid, force, scale, min_p
    layers: Spans | None
    experts: Spans
    value: float = 0.0

    def holds(self, layer: int) -> bool:
        return self.layers is None or any(low <= layer <= high for low, high in self.layers)

    def __str__(self) -> str:
        place = "" if self.layers is None else f"L{_written(self.layers)}:"
        if self.kind == "min_p":
            return f"min_p={place}{self.value:g}"
        factor = f"*{self.value:g}" if self.kind == "scale" else ""
        return f"{self.kind}={place}{_written(self.experts)}{factor}"


@dataclass(frozen=True, slots=True)
class Steering:
    """What is steered in one router; experts by id."""

    forbid: tuple[int, ...] = ()
    force: tuple[int, ...] = ()
    scale: tuple[tuple[int, float], ...] = ()
    min_p: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.forbid or self.force or self.scale or self.min_p)


def split(expression: str) -> tuple[str, str]:
    """A lane expression as its variant expression and its steering ("" where there is none)."""
    variant, *steering = _WITH.split(expression, maxsplit=1)
    return variant.strip() or "trained", steering[0].strip() if steering else ""


def canonical(expression: str) -> str:
    """A lane expression in its one way of writing. Raises MoescopeError (USAGE)."""
    from moescope import variants

    variant, steering = split(expression)
    items = parse(steering)
    written = variants.canonical(variant)
    return f"{written}{WORD}{','.join(map(str, items))}" if items else written


@lru_cache(maxsize=256)
def parse(steering: str) -> tuple[Item, ...]:
    """Steering items. Raises MoescopeError (USAGE) naming the part that is wrong."""
    if not steering:
        return ()
    if len(steering) > MAX_LENGTH:
        _refuse(steering[:40] + "…", f"expected at most {MAX_LENGTH} characters")
    parts = [part.strip() for part in steering.split(",")]
    if len(parts) > MAX_ITEMS:
        _refuse(steering[:40] + "…", f"expected at most {MAX_ITEMS} items")
    return tuple(_item(part) for part in parts)


def _item(part: str) -> Item:
    kind, _, rest = part.partition("=")
    pattern = _PATTERNS.get(kind)
    if pattern is None:
        _refuse(part, f"expected {', '.join(_PATTERNS)}, found {kind[:40]!r}")
    found = pattern.fullmatch(rest)
    if found is None:
        _refuse(part, "expected a place such as L12:3 or 3+5")
    layers = None if found[1] is None else _spans(part, found[1])
    if kind == "min_p":
        value = float(found[2])
        if not 0 < value <= 1:
            _refuse(part, f"expected a share above 0 and at most 1, found {value:g}")
        return Item(kind, layers, (), value)
    return Item(kind, layers, _spans(part, found[2]), float(found[3]) if kind == "scale" else 0.0)


def _spans(part: str, text: str) -> Spans:
    spans = []
    for piece in text.split("+"):
        low, _, high = piece.partition("-")
        spans.append((int(low), int(high or low)))
        if spans[-1][0] > spans[-1][1]:
            _refuse(part, f"expected a span that rises, found {piece}")
    return tuple(spans)


def _written(spans: Spans) -> str:
    return "+".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def of_routers(
    steering: str, routers: Sequence[tuple[int, RouterSpec]]
) -> tuple[Steering | None, ...]:
    """What is steered in each router, given as (layer, spec in force); None: nothing.

    Raises MoescopeError (USAGE) for experts a router does not have, for a choice that leaves it too
    few or too many, and for routers whose choice cannot be steered.
    """
    items = parse(steering)
    for item in items:
        if not any(item.holds(layer) for layer, _ in routers):
            layers = f"{routers[0][0]} to {routers[-1][0]}"
            _refuse(str(item), f"expected layers with a router, {layers}")
    return tuple(_of_router(items, layer, spec) for layer, spec in routers)


def _of_router(items: Sequence[Item], layer: int, spec: RouterSpec) -> Steering | None:
    chosen: dict[str, dict[int, float]] = {"forbid": {}, "force": {}, "scale": {}}
    min_p = 0.0
    for item in items:
        if not item.holds(layer):
            continue
        if item.kind == "min_p":
            min_p = item.value
            continue
        for low, high in item.experts:
            if high >= spec.E:
                _refuse(str(item), f"layer {layer} has experts 0 to {spec.E - 1}")
            chosen[item.kind].update(dict.fromkeys(range(low, high + 1), item.value))
    found = Steering(
        tuple(sorted(chosen["forbid"])),
        tuple(sorted(chosen["force"])),
        tuple(sorted(chosen["scale"].items())),
        min_p,
    )
    _check(found, layer, spec)
    return found or None


def _check(found: Steering, layer: int, spec: RouterSpec) -> None:
    policy = spec.policy
    biased = policy.weights_from in ("biased_scores", "biased_minus_bias")
    for wrong, why in (
        (set(found.forbid) & set(found.force), "an expert is both forbidden and forced"),
        (len(found.force) > spec.K, f"only {spec.K} experts are chosen"),
        (spec.E - len(found.forbid) < spec.K, f"{spec.K} experts must be left to choose from"),
        (
            (found.forbid or found.force)
            and (policy.scoring_func == "sparsemixer" or spec.wiring.hash_table or biased),
            "this router's choice cannot be steered",
        ),
    ):
        if wrong:
            _refuse(f"layer {layer}", why)


def _refuse(part: str, why: str) -> NoReturn:
    raise MoescopeError(f"steering {part!r}: {why}", hint=HINT, code=ExitCode.USAGE)
