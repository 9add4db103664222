"""Quantised weights: which tensors of a checkpoint are packed, and what numbers they stand for.

`settings` reads the config, `formats` is the table of formats, `held` puts both and the names of a
checkpoint together before anything is read. numpy only, so that every interpreter can use it; what
goes where in the decoder is `families`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from moescope.engine.config import bad
from moescope.engine.header import TensorInfo
from moescope.engine.quantised.formats import FORMATS, Format, expand, words
from moescope.engine.quantised.packed import Group, Held, Packed
from moescope.engine.quantised.scheme import Rule, Scheme
from moescope.engine.quantised.settings import read_scheme
from moescope.errors import MoescopeError
from moescope.safety import single_line

__all__ = ["Held", "Packed", "expand", "held", "notes", "read_scheme", "words"]

MAIN = "weight"  # the role every format has
PACKED = "packed"  # in place of a dtype


def held(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Held]:
    """What a checkpoint holds, by the names of an unpacked one.

    Every tensor of a packed one is checked here: MoescopeError for one that is missing, has another
    dtype or shape than its format gives it, or is packed though the config says it is not.
    """
    found = {name: Held(info.shape, info.shard, info.dtype) for name, info in tensors.items()}
    scheme = read_scheme(config)
    if scheme is None:
        return found
    faults: dict[str, MoescopeError] = {}
    used: set[str] = set()
    for name in dict.fromkeys(rule.format for rule in scheme.rules):
        rules = [rule for rule in scheme.rules if rule.format == name]
        for group in _groups(name, FORMATS[name], tensors):
            weight = group.tensors[MAIN]
            fault = _fault(group, FORMATS[name])
            readings = () if fault is not None else tuple(_readings(group, rules, scheme))
            if not readings:
                faults.setdefault(weight.name, fault or _misfit(group))
                continue
            _expect_listed_otherwise(group, scheme)
            used.add(weight.name)
            for info in group.tensors.values():
                found.pop(info.name, None)
            found[group.name] = Held(readings[0].shape, weight.shard, PACKED, readings)
    for name, fault in faults.items():
        if name not in used:
            raise fault
    return found


def notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of how these weights were meant to be run."""
    scheme = read_scheme(config)
    return scheme.notes if scheme is not None else ()


def _groups(name: str, format: Format, tensors: Mapping[str, TensorInfo]) -> Iterator[Group]:
    """Tensors that could be of this format: its first role marks them, and its weight is there."""
    marker = next(iter(format.roles.values())).suffix
    for published in tensors:
        if not published.endswith(marker):
            continue
        base = published.removesuffix(marker)
        roles = {role: tensors.get(base + kind.suffix) for role, kind in format.roles.items()}
        there = {role: info for role, info in roles.items() if info is not None}
        if MAIN in there:
            yield Group(name, base + format.ending, there)


def _readings(group: Group, rules: Iterable[Rule], scheme: Scheme) -> Iterator[Packed]:
    """What the rules make of a group; those about its own module, if any, count alone."""
    if any(0 in info.shape for info in group.tensors.values()):
        return
    module = _module(group)
    named = {rule.path for rule in scheme.rules if rule.path is not None}
    about = module if module in named else None
    for rule in rules:
        if rule.path == about:
            yield from rule.readings(group)


def _module(group: Group) -> str:
    return group.name.removesuffix(".weight")


def _fault(group: Group, format: Format) -> MoescopeError | None:
    """What is missing beside a weight, or has another dtype than in this format."""
    weight = group.tensors[MAIN]
    base = weight.name.removesuffix(format.roles[MAIN].suffix)
    for role, kind in format.roles.items():
        info = group.tensors.get(role)
        if info is None and kind.required:
            return bad(
                f"{_shown(weight)}: expected {_short(base + kind.suffix)} beside it, found none"
            )
        if info is not None and info.dtype not in kind.dtypes:
            return bad(f"{_shown(info)}: expected {' or '.join(kind.dtypes)}, found {info.dtype}")
    return None


def _misfit(group: Group) -> MoescopeError:
    shapes = ", ".join(f"{role} {list(info.shape)}" for role, info in group.tensors.items())
    return bad(
        f"{_shown(group.tensors[MAIN])}: expected shapes of {group.format} as config.json has it, "
        f"found {shapes}",
        "config.json and the weights are of different models, or one of them is damaged",
    )


def _expect_listed_otherwise(group: Group, scheme: Scheme) -> None:
    module = _module(group)
    for pattern in scheme.plain:
        if module == pattern or module.startswith(f"{pattern}.") or fnmatchcase(module, pattern):
            raise bad(
                f"{scheme.listed}: lists {single_line(pattern, 80)} as unquantised; "
                f"{_shown(group.tensors[MAIN])} is packed"
            )


def _shown(info: TensorInfo) -> str:
    return f"{single_line(info.shard, 120)}: {single_line(info.name, 200)}"


def _short(name: str) -> str:
    return single_line(".".join(name.split(".")[-2:]), 120)
