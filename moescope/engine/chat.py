"""The chat template of a checkpoint: where it comes from, and rendering it in a throw-away child.

A template is a program in a sandboxed language (Jinja): the sandbox keeps it from files, the child
keeps it from processor time and memory. Nothing here knows tokens; `tokenizer.py` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.engine import guarded
from moescope.engine.config import bad, shown
from moescope.engine.files import refused
from moescope.safety import LIMITS, single_line

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_PLAIN = "write the prompt as raw text (--prompt)"
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text, which file it came from, and the names of special tokens it may use."""

    text: str
    source: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one string; a MoescopeError where the template fails."""
        names = {
            **self.special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        task = {"template": self.text, "names": names, "most": LIMITS.rendered_chars}
        answer = guarded.run(
            "template",
            json.dumps(task).encode(),
            seconds=LIMITS.template_seconds,
            memory=LIMITS.template_memory,
        )
        if answer.refused:
            raise refused(f"{self.source}: chat template: refused: {answer.trouble}", _PLAIN)
        text = answer.value.get("text")
        if answer.trouble or not isinstance(text, str):
            raise bad(
                f"{self.source}: chat template: {answer.trouble or 'no text came out'}", _PLAIN
            )
        return text


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens in tokenizer_config.json, each a string or an object."""
    found: dict[str, str] = {}
    for name in _SPECIAL:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def find_template(
    file: bytes | None, settings: Mapping[str, Any], notes: list[str]
) -> ChatTemplate | None:
    """The template to use: chat_template.jinja before tokenizer_config's, its `default` by name.

    A template that cannot be used is a note, not an error: the model runs on raw text.
    """
    text, source = _from_settings(settings.get("chat_template"), notes)
    if file is not None:
        try:
            own = file.decode("utf-8-sig")
        except UnicodeDecodeError:
            notes.append(f"{FILE}: expected UTF-8; not used")
        else:
            if text is not None and text != own:
                notes.append(f"{FILE} is used; {source} holds another chat template")
            text, source = own, FILE
    if text is None:
        return None
    if len(text.encode("utf-8", "replace")) > LIMITS.template_bytes:
        notes.append(f"{source}: chat template: more than {LIMITS.template_bytes} bytes; not used")
        return None
    return ChatTemplate(text, source, special_tokens(settings))


def _from_settings(value: Any, notes: list[str]) -> tuple[str | None, str]:
    if value is None or isinstance(value, str):
        return value, SETTINGS
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else []:
        match entry:
            case {"name": str(name), "template": str(text)}:
                named.setdefault(name, text)
    if not named:
        notes.append(
            f"{SETTINGS}: chat_template: expected a string, found {shown(value)}; not used"
        )
        return None, SETTINGS
    name = "default" if "default" in named else next(iter(named))
    return named[name], f"{SETTINGS} ({single_line(name, 40)})"
