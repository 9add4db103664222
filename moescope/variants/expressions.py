"""Variant expressions: read, written in one way, and applied to a router spec.

An expression is one or more groups, separated by `/`; a group is items separated by `,` and, after
`@`, the layers it holds for (`3-7`, `0+2-4`; none: all). An item is a name of the catalogue or a
field of the spec: `norm_topk_prob=true`, `top_k+1`.

    softmax_over_selected        norm_topk_prob=true,num_experts_per_tok=4@3-7
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NoReturn, get_args, get_type_hints

from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.variants.catalogue import CATALOGUE
from moescope.variants.entry import By, Variant

MAX_LENGTH = 1000
MAX_LAYER = 9999
HINT = "moescope variants lists names and fields"


# What the recorded logits cannot show: it happens before them, or beside the router.
_ON_LOGITS_TOO = {"combine_dtype"}
_BEFORE_LOGITS = {"gate_quant_bits"}
_ALIASES = {"top_k": "num_experts_per_tok"}


# --- expressions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Edit:
    """One field of the spec: set (`=`), raised (`+`) or lowered (`-`) by `value`."""

    field: str
    operator: str
    value: Any

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return f"{self.field}{self.operator}{value}"


@dataclass(frozen=True, slots=True)
class Group:
    """Items in the order they apply, and the layers they hold for (None: all)."""

    items: tuple[str | Edit, ...]
    layers: tuple[tuple[int, int], ...] | None = None

    def holds(self, layer: int) -> bool:
        return self.layers is None or any(low <= layer <= high for low, high in self.layers)

    @property
    def decoder(self) -> tuple[str, ...]:
        """The names of `DECODER_EDITS` that its items bring."""
        named = (CATALOGUE[item].decoder for item in self.items if isinstance(item, str))
        return tuple(name for names in named for name in names)

    def __str__(self) -> str:
        items = ",".join(map(str, self.items))
        if self.layers is None:
            return items
        spans = (str(low) if low == high else f"{low}-{high}" for low, high in self.layers)
        return f"{items}@{'+'.join(spans)}"


@dataclass(frozen=True, slots=True)
class Edits:
    """A parsed expression, normalised: equal expressions are equal values. Empty: as trained."""

    groups: tuple[Group, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """The spec fields that may change."""
        names: set[str] = set()
        for group in self.groups:
            for item in group.items:
                names |= {item.field} if isinstance(item, Edit) else _touched(CATALOGUE[item])
        return frozenset(names)

    @property
    def decoder(self) -> frozenset[str]:
        """The names of `DECODER_EDITS` that hold in some layer."""
        return frozenset(name for group in self.groups for name in group.decoder)

    def decoder_at(self, layer: int) -> tuple[str, ...]:
        """The names of `DECODER_EDITS` that hold in `layer`, each once."""
        held = (group.decoder for group in self.groups if group.holds(layer))
        return tuple(dict.fromkeys(name for names in held for name in names))

    @property
    def rebuilds(self) -> bool:
        """Whether more than the policy changes, so that an interpreter must rebuild its step."""
        return bool(self.fields & _hints(RouterWiring).keys() or self.decoder)

    @property
    def on_logits(self) -> bool:
        """Whether recorded logits are enough to see what this variant would have decided."""
        unseen = (_hints(RouterWiring).keys() - _ON_LOGITS_TOO) | _BEFORE_LOGITS
        return not (self.fields & unseen or self.decoder)

    def __str__(self) -> str:
        return "/".join(map(str, self.groups)) or "trained"


@lru_cache(maxsize=1024)
def parse(expression: str) -> Edits:
    """An expression as edits. Raises MoescopeError naming the part that is wrong."""
    if len(expression) > MAX_LENGTH:
        _refuse(expression[:40] + "…", f"expected at most {MAX_LENGTH} characters")
    groups = (_parse_group(text, expression) for text in expression.split("/"))
    return Edits(tuple(group for group in groups if group.items))


def canonical(expression: str) -> str:
    """The one way to write `expression`; `trained` where it changes nothing."""
    return str(parse(expression))


def _parse_group(text: str, expression: str) -> Group:
    body, at, where = text.partition("@")
    items = [_parse_item(item.strip(), expression) for item in body.split(",")]
    layers = _parse_layers(where, expression) if at else None
    return Group(tuple(item for item in items if item != "trained"), layers)


def _parse_item(text: str, expression: str) -> str | Edit:
    found = re.fullmatch(r"(\w+)\s*([=+-])\s*(.*)", text, re.ASCII)
    if not found:
        if text not in CATALOGUE:
            known = [*CATALOGUE, *_hints(RouterPolicy), *_hints(RouterWiring)]
            missing = f"{text} needs a value, as in {text}=…"
            _refuse(expression, missing if text in known else _unknown(text, known))
        if CATALOGUE[text].seen == "none":
            _refuse(expression, f"{text} is listed only: no router differs by it")
        return text
    name, operator, value = found.groups()
    name = _ALIASES.get(name, name)
    hints = {**_hints(RouterPolicy), **_hints(RouterWiring)}
    if name in CATALOGUE:
        _refuse(expression, f"{name} takes no {operator!r}; a comma joins several")
    if name not in hints:
        _refuse(expression, _unknown(name, [*hints, *CATALOGUE]))
    if name in ("num_experts", "num_null_experts"):
        _refuse(expression, f"{name} is a fact of the checkpoint and cannot be edited")
    if operator != "=":
        if hints[name] is not int:
            _refuse(expression, f"{name}: only whole numbers can be raised or lowered")
        if not re.fullmatch(r"0*[1-9]\d{0,5}", value, re.ASCII):
            _refuse(expression, f"{name}: expected a number from 1 after {operator}", value)
        return Edit(name, operator, int(value))
    return Edit(name, "=", _parse_value(name, value, hints[name], expression))


def _parse_value(name: str, text: str, hint: Any, expression: str) -> Any:
    """A value of the field's type: an enum word, true or false, an integer, a finite number."""
    if words := {str(value): value for value in get_args(hint) if value != "model"}:
        if text not in words:
            _refuse(expression, f"{name}: expected one of {', '.join(words)}", text)
        return words[text]
    if hint is bool:
        if text not in ("true", "false"):
            _refuse(expression, f"{name}: expected true or false", text)
        return text == "true"
    if hint is int:
        if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
            _refuse(expression, f"{name}: expected a whole number", text)
        return int(text)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        _refuse(expression, f"{name}: expected a number", text)
    number = float(text)
    if not math.isfinite(number):
        _refuse(expression, f"{name}: expected a finite number", text)
    return number + 0.0  # -0 is 0


def _parse_layers(text: str, expression: str) -> tuple[tuple[int, int], ...]:
    """`3-7+9` as sorted spans that neither touch nor overlap."""
    spans = []
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part, re.ASCII)
        if not found:
            _refuse(expression, "layers: expected numbers as in @3-7 or @0+2-4", text)
        low = int(found[1])
        high = int(found[2]) if found[2] else low
        if high < low:
            _refuse(expression, "layers: expected the lower number first", part)
        spans.append((low, high))
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


# --- from edits to specs --------------------------------------------------------------------------


def apply(expression: str | Edits, spec: RouterSpec, layer: int) -> RouterSpec:
    """`spec`, the trained router of `layer`, under the expression. Raises MoescopeError naming the
    fields when the result means nothing."""
    edits = parse(expression) if isinstance(expression, str) else expression
    for group in edits.groups:
        if group.holds(layer):
            try:
                spec = _edited(spec, group.items)
            except ValueError as error:
                raise MoescopeError(
                    f"variant {str(edits)!r}: layer {layer}: {error}", hint=HINT
                ) from None
    return spec


def applicable(
    variant: Variant | str, spec: RouterSpec, facts: Collection[str] | None = None
) -> bool:
    """Whether `variant` means something for `spec` and changes what it decides, or what is made of
    it. `facts` are what is known of the decoder around it (see `FACTS`); None: nothing, and what
    needs some does not apply."""
    variant = CATALOGUE[variant] if isinstance(variant, str) else variant
    if variant.name == "trained":
        return True
    if variant.seen == "none" or not set(variant.needs) <= set(facts or ()):
        return False
    if any(_present(spec, name) not in allowed for name, allowed in variant.requires.items()):
        return False
    try:
        edited = _edited(spec, (variant.name,))
    except ValueError:
        return False
    return bool(variant.decoder) or not edited.equal(spec)


def title(expression: str | Edits) -> str:
    """Words for an expression, for a lane's head: `top-k + 1, layers 3-7`."""
    edits = parse(expression) if isinstance(expression, str) else expression
    return " / ".join(map(_group_title, edits.groups)) or CATALOGUE["trained"].title


def describe(expression: str, spec: RouterSpec) -> str:
    """Title and resulting spec, in one line; ≡ where the router decides as trained. Takes the
    first layer that the expression holds for."""
    edits = parse(expression)
    spans = [group.layers[0][0] for group in edits.groups if group.layers]
    everywhere = any(group.layers is None for group in edits.groups)
    result = apply(edits, spec, 0 if everywhere or not spans else min(spans))
    equal = " (≡ trained)" if edits.groups and result.equal(spec) else ""
    return f"{title(edits)}: {result.line()}{equal}"


@lru_cache(maxsize=4096)
def _edited(spec: RouterSpec, items: tuple[str | Edit, ...]) -> RouterSpec:
    """All items at once, so that fields which only go together can be set together."""
    new: dict[str, Any] = {}
    for item in items:
        for name, value in _assignments(item, spec, new):
            new[name] = value
    policy = {name: value for name, value in new.items() if name in _hints(RouterPolicy)}
    wiring = {name: value for name, value in new.items() if name not in policy}
    if wiring:
        spec = spec.with_wiring(**wiring)
    return spec.with_policy(**policy) if policy else spec


def _assignments(
    item: str | Edit, spec: RouterSpec, new: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    if isinstance(item, str):
        variant = CATALOGUE[item]
        pairs = []
        for name, value in (*variant.policy.items(), *variant.wiring.items()):
            present = new.get(name, _present(spec, name))
            pairs.append((name, _changed(present, value)))
        return pairs
    if item.operator == "=":
        return [(item.field, item.value)]
    present = new.get(item.field, _present(spec, item.field))
    return [(item.field, present + (item.value if item.operator == "+" else -item.value))]


def _changed(present: Any, value: Any) -> Any:
    """An edit's value, given the present one."""
    if isinstance(value, Mapping):
        return value.get(present, present)
    return present + value.amount if isinstance(value, By) else value


def _present(spec: RouterSpec, name: str) -> Any:
    return getattr(spec.policy if name in _hints(RouterPolicy) else spec.wiring, name)


def _touched(variant: Variant) -> set[str]:
    return {*variant.policy, *variant.wiring}


def _group_title(group: Group) -> str:
    words = ", ".join(map(_item_title, group.items))
    _, at, layers = str(group).partition("@")
    return f"{words}, layers {layers}" if at else words


def _item_title(item: str | Edit) -> str:
    if isinstance(item, str):
        return CATALOGUE[item].title
    if item.field == "num_experts_per_tok":
        return (
            f"top-{item.value}" if item.operator == "=" else f"top-k {item.operator} {item.value}"
        )
    return str(item)


@lru_cache(maxsize=2)
def _hints(kind: type) -> dict[str, Any]:
    """Field name -> type, in the order of the fields."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    words = f"unknown name {name[:80]!r}"
    return f"{words}; did you mean {', '.join(close)}?" if close else words


def _refuse(expression: str, why: str, found: str | None = None) -> NoReturn:
    """repr() shows control and format characters escaped, so this is safe to print."""
    tail = "" if found is None else f", found {found[:80]!r}"
    raise MoescopeError(
        f"variant {expression[:120]!r}: {why}{tail}", hint=HINT, code=ExitCode.USAGE
    )
