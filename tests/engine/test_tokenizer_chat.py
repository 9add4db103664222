"""Chat templates: rendered as transformers renders them, and harmless whatever they try."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from moescope.engine import chat
from moescope.engine.chat import ChatTemplate, find_template
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, printable

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was heißt „Füße“?\n<b>&amp; 'x'"},
    {"role": "assistant", "content": " feet "},
    {"role": "user", "content": "你好 🙂"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

ORDINARY = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'"
        " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "instruct": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{% if loop.first and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks": (
        "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
        "        {% generation %}\n{{ m.content }}{{ eos_token }}\n        {% endgeneration %}\n"
        "    {%- else %}\n        {{- m.content }}\n    {% endif %}\n{% endfor %}\n"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ loop.index }}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}"
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}"
        "{{ messages[3].content | tojson(ensure_ascii=true) }}"
    ),
    "macros and namespaces": (
        "{% macro shout(text) %}{{ text | upper }}!{% endmacro %}"
        "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}"
        "{{ shout(m.role) }}{% endfor %}{{ ns.count }}{{ tools is none }}{{ missing }}"
        "{{ messages | map(attribute='role') | join(',') }}{{ messages[::-1][0].content }}"
    ),
    "literals": "{{ 'Ä\\n\\t\\u00e9' ~ 1.5 ~ [1, 'a'] ~ {'k': none} }}{{ '%05d' | format(7) }}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\nb\n\n",
}


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY)
def test_templates_render_as_transformers_renders_them(text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [MESSAGES], chat_template=text, add_generation_prompt=True, **SPECIAL
    )
    assert ChatTemplate(text, "x", SPECIAL).render(MESSAGES) == rendered[0]


def test_the_date_is_todays() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}", "x", {}).render([])
    assert abs(int(year) - time.localtime().tm_year) <= 1


def test_a_template_may_refuse_a_conversation() -> None:
    template = ChatTemplate(ORDINARY["instruct"], "tokenizer_config.json", SPECIAL)
    with pytest.raises(MoescopeError) as caught:
        template.render([MESSAGES[2]])
    assert caught.value.message == "tokenizer_config.json: chat template: roles must alternate"
    assert caught.value.code == ExitCode.CHECKPOINT and "--prompt" in caught.value.hint


# --- which template -------------------------------------------------------------------------------

NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
SOURCES: dict[str, tuple[bytes | None, Any, str | None, str, int]] = {
    "none": (None, None, None, "", 0),
    "a string": (None, "A", "A", "tokenizer_config.json", 0),
    "the default of several": (None, NAMED, "D", "tokenizer_config.json (default)", 0),
    "the first of several": (None, NAMED[:1], "T", "tokenizer_config.json (tool_use)", 0),
    "a file": (b"F", None, "F", "chat_template.jinja", 0),
    "both alike": (b"F", "F", "F", "chat_template.jinja", 0),
    "both, different": (b"F", "A", "F", "chat_template.jinja", 1),
    "a file that is no text": (b"\xff", "A", "A", "tokenizer_config.json", 1),
    "a number": (None, 3, None, "", 1),
    "a broken list": (None, [1, {"name": 2}], None, "", 1),
    "too large": (b"x" * (LIMITS.template_bytes + 1), None, None, "", 1),
}


@pytest.mark.parametrize("file, setting, text, source, notes", SOURCES.values(), ids=SOURCES)
def test_which_template_is_used(
    file: bytes | None, setting: Any, text: str | None, source: str, notes: int
) -> None:
    said: list[str] = []
    settings = {"chat_template": setting, "eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    found = find_template(file, settings, said)
    assert (found.text if found else None) == text
    if found:
        assert found.source == source and found.special_tokens == SPECIAL
    assert len(said) == notes


# --- hostile templates ----------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One second for a child, so that tests of endless work end soon."""
    monkeypatch.setattr(chat, "LIMITS", replace(LIMITS, template_seconds=1.0))
    yield


ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__base__') }}",
    "attr by format": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self._TemplateReference__context.environment.loader }}",
    "import": "{% import '/etc/passwd' as x %}",
    "include": "{% include '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "code object": "{{ strftime_now.__code__.co_consts }}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "map attribute": "{{ messages|map(attribute='__class__')|list }}",
    "joiner": "{{ joiner.__call__.__globals__ }}",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES)
def test_a_template_reaches_nothing_but_its_names(text: str) -> None:
    template = ChatTemplate(text, "x", {})
    try:
        shown = template.render(MESSAGES)
    except MoescopeError as error:
        assert error.code in (ExitCode.REFUSED, ExitCode.CHECKPOINT)
        assert error.message == printable(error.message) and "\n" not in error.message
    else:
        assert "root" not in shown and "<class" not in shown and "builtins" not in shown


def test_the_sandboxs_refusal_is_a_refusal() -> None:
    with pytest.raises(MoescopeError, match="refused: access to attribute '__class__'") as caught:
        ChatTemplate(ESCAPES["class"], "x", {}).render(MESSAGES)
    assert caught.value.code == ExitCode.REFUSED


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "doubling": (
        "{% set n = namespace(x='a') %}"
        "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "power": "{{ 10 ** (10 ** 8) }}",
    "padding": "{{ '%999999999999d' | format(1) }}",
    "centred": "{{ 'x' | center(99999999999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much text": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "strftime": "{{ strftime_now('%999999999d') }}",
    "word wrap": "{{ ('x ' * 300000) | wordwrap(1) | wordwrap(1) | length }}",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_works_without_end_is_stopped(hurried: None, text: str) -> None:
    started = time.monotonic()
    try:
        shown = ChatTemplate(text, "x", {}).render(MESSAGES)
        assert len(shown) <= LIMITS.rendered_chars
    except MoescopeError as error:
        assert error.message.startswith("x: chat template: ")
        assert error.message == printable(error.message) and len(error.message) < 500
    assert time.monotonic() - started < 6  # its clock stops the child after three


@pytest.mark.parametrize("text", ["{% for %}", "{{", "{% nonsense %}", "{{ 1/0 }}", "{{ x.y.z }}"])
def test_a_broken_template_is_an_error(text: str) -> None:
    with pytest.raises(MoescopeError, match="x: chat template: "):
        ChatTemplate(text, "x", {}).render(MESSAGES)


def test_an_exceptions_text_is_cleaned() -> None:
    text = "{{ raise_exception('\x1b]0;owned\x07\n\u202e' ~ 'x' * 9999) }}"
    with pytest.raises(MoescopeError) as caught:
        ChatTemplate(text, "x", {}).render(MESSAGES)
    assert "\\x1b]0;owned\\x07\\n<U+202E>" in caught.value.message
    assert len(caught.value.message) < 400


def test_the_child_gets_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    start = subprocess.Popen

    def watched(*arguments: Any, **options: Any) -> Any:
        given.append(options["env"])
        return start(*arguments, **options)

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(subprocess, "Popen", watched)
    assert ChatTemplate("x", "x", {}).render([]) == "x"
    assert given and "secret" not in given[0].values()
