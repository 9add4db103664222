"""What a config said of quantised weights, once read: data, and the readers all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moescope.engine.config import Fields
from moescope.engine.quantised.packed import Group, Packed

Readings = Callable[[Group], Iterable[Packed]]
# ModelOpt's own file beside config.json; a checkpoint's config has it under this name
MODELOPT_FILE = "hf_quant_config.json"
MOST = 1 << 20  # a group's columns, or a block's rows
ACTIVATIONS = "made for {0} activations; here activations stay as they are, only weights are {0}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One format a checkpoint may hold, and how its tensors may be read; `path` is the module it
    is about, where the config names one."""

    format: str
    readings: Readings
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """All that a config says. `plain` are modules it lists as unquantised, under `listed`."""

    method: str
    rules: tuple[Rule, ...]
    plain: tuple[str, ...] = ()
    listed: str = ""
    notes: tuple[str, ...] = ()


def expect_known(block: Fields, known: str) -> None:
    """Refuse keys that are not among the words of `known`, unless they say nothing."""
    words = {*known.split(), "quant_method"}
    for key, value in block.values.items():
        if key not in words and value not in (None, False, "", [], {}):
            raise block.error(key, "no such key: what it asks for is not implemented")


def names(block: Fields, *keys: str) -> tuple[tuple[str, ...], str]:
    """The modules listed under the first of these keys that is there, and where that is."""
    for key in keys:
        if block.has(key):
            return tuple(block.list(key, str)), block.place(key)
    return (), ""


def group_size(block: Fields, key: str = "group_size", default: int = -1) -> int:
    """A group size; 0 where the whole row (-1) is one group."""
    size = block.int(key, -1, MOST, default)
    if size == 0:
        raise block.error(key, "-1 or a positive integer")
    return max(size, 0)


def one_of(values: Iterable[int]) -> str:
    return "one of " + ", ".join(map(str, sorted(set(values))))
