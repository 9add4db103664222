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

# Types that are a family's under another name. Positions of GLM-4.5V's text have several axes; in
# text all are equal, which is the family's own rope.
_SAME = {"glm4v_moe_text": "glm4_moe", "joyai_llm_flash": "deepseek_v3"}


@dataclass(frozen=True, slots=True)
class Text:
    """The config of the text model, and the family's `model_type` for it. Where it is a part of a
    whole, `outer` is the whole's type and `named` what the text's own config calls itself."""

    fields: Fields
    model_type: str
    named: str = ""
    outer: str = ""

    def notes(self) -> tuple[str, ...]:
        if not self.outer:
            return ()
        return (
            f"{single_line(self.outer, 80)}: only its text model ({self.named}) is loaded; "
            "images and sound are not read",
        )


def text_of(config: Mapping[str, Any], supported: Container[str]) -> Text | None:
    """The first text model of a `supported` type, the whole before its parts; None without one."""
    whole = Fields(config).str("model_type")
    if (found := _SAME.get(whole, whole)) in supported:
        return Text(Fields({**config, "model_type": found}), found)
    for place, inner in _parts(config, "", _DEPTH):
        named = inner.get("model_type")
        if not isinstance(named, str):
            continue
        if (found := _SAME.get(named, named)) in supported:
            of_all = {key: config[key] for key in _OF_ALL if key in config}
            values = {**inner, **of_all, "model_type": found}
            return Text(Fields(values, prefix=place), found, named, whole)
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
