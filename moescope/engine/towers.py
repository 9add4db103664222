"""Checkpoints of several towers: which part of a config is about the text, and what holds for it.

Vision and omni models keep a text model of its own type in `text_config` (or `llm_config`, or
below `thinker_config`). Only that is loaded; the prefix of its tensors is told by `families.names`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from moescope.engine.config import Fields
from moescope.safety import single_line

_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
_DEPTH = 2
# What the whole model's config says of its text, whatever that says of itself: transformers ties
# the head of a composite model by its outermost config.
_OF_ALL = ("tie_word_embeddings",)


@dataclass(frozen=True, slots=True)
class Text:
    """The config of the text model. `place` is where it stands in the file (`text_config.`), and
    empty where the model is one of text alone; `outer` is then empty too, else the whole's type."""

    fields: Fields
    model_type: str
    place: str = ""
    outer: str = ""

    def notes(self) -> tuple[str, ...]:
        if not self.outer:
            return ()
        return (
            f"{single_line(self.outer, 80)}: only its text model ({self.model_type}) is loaded; "
            "images and sound are not read",
        )


def text_of(config: Mapping[str, Any], supported: Container[str]) -> Text | None:
    """The first text model of a `supported` type, the whole before its parts; None without one."""
    whole = Fields(config).str("model_type")
    if whole in supported:
        return Text(Fields(config), whole)
    for place, inner in _parts(config, "", _DEPTH):
        found = inner.get("model_type")
        if isinstance(found, str) and found in supported:
            values = {**inner, **{key: config[key] for key in _OF_ALL if key in config}}
            return Text(Fields(values, prefix=place), found, place, whole)
    return None


def parts_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The objects of a config that may be about text: it itself, then those within it."""
    return [config, *(inner for _, inner in _parts(config, "", _DEPTH))]


def _parts(
    config: Mapping[str, Any], place: str, depth: int
) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for key in _KEYS if depth else ():
        if isinstance(inner := config.get(key), Mapping):
            here = f"{place}{key}."
            found += [(here, inner), *_parts(inner, here, depth - 1)]
    return found
