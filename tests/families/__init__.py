"""The families' test tables: one module for each lineage of `moescope.engine.families`.

A module may hold:

    TINY       model type -> config fields of a tiny model, beside `tests.tiny`'s usual ones
    CASES      at least two for each family; the first is what a normal run of the tests compares
    MUTANTS    wrong specs beyond the generic ones of `tests.oracle.mutants`
    EXEMPT     (model type or case id, `Class.field` or mutant's name) -> why no comparison sees it
    CLASSES    model type -> its class in transformers, where the automatic one does not know it; or
               what makes a model of a config
    SAME       model type -> the one that transformers reads it as
    MLX        model type -> router logits (gate, input), of those compared with mlx-lm
    READ       model type -> how its routers are listened to (`kit.TOP_K` where it is not there)
    INIT       model type -> how some of its tensors are filled
    OLDER      model type -> what makes the published dialect of a config that transformers saved
    LAYOUTS    model type -> layouts of `tests.tiny` beside hub and fused
    PUBLISHED  model type -> the config of a released checkpoint
    COUNTS     model type -> parameters of that, and those read for a token, in billions
    REFUSED_EDITS  (case id, key, value, what the message names): configs of another model

Modules are found by name; what they hold is collected here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tests.families.kit import Case, Init, Mutant, Read, merged

_ORDER = ("olmo", "qwen", "mixtral")  # the first of them in lists; others by name
_FOUND = sorted(
    (module.name for module in iter_modules(__path__) if module.name != "kit"),
    key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name),
)

TINY: dict[str, dict[str, Any]] = {}
CASES: tuple[Case, ...] = ()
MUTANTS: tuple[Mutant, ...] = ()
EXEMPT: dict[tuple[str, str], str] = {}
CLASSES: dict[str, str | Callable[..., Any]] = {}
SAME: dict[str, str] = {}
MLX: dict[str, Callable[[Any, Any], Any]] = {}
READ: dict[str, Read] = {}
INIT: dict[str, Init] = {}
OLDER: dict[str, Callable[[dict[str, Any]], None]] = {}
LAYOUTS: dict[str, tuple[str, ...]] = {}
PUBLISHED: dict[str, dict[str, Any]] = {}
COUNTS: dict[str, tuple[float, float]] = {}
REFUSED_EDITS: tuple[tuple[str, str, Any, str], ...] = ()

_LISTS = ("CASES", "MUTANTS", "REFUSED_EDITS")
_TABLES = (
    "TINY",
    "EXEMPT",
    "CLASSES",
    "SAME",
    "MLX",
    "READ",
    "INIT",
    "OLDER",
    "LAYOUTS",
    "PUBLISHED",
    "COUNTS",
)
for _name in _FOUND:
    _held = vars(import_module(f"{__name__}.{_name}"))
    for _list in _LISTS:
        globals()[_list] += tuple(_held.get(_list, ()))
    for _table in _TABLES:
        globals()[_table] = merged(globals()[_table], _held.get(_table, {}))
