"""What runs in the throw-away child of `guarded.py`: foreign tokenizers and chat templates.

Run as a script, by path, isolated; imports nothing of moescope. Reads its task from standard input,
puts limits on itself first, and writes one JSON object to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def limit(cpu_seconds: int, memory: int) -> None:
    """No more than this processor time and memory, and no byte written to any file."""
    import resource

    limits = [
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),  # a second apart, for its own signal
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_AS, memory, memory),
    ]
    for what, soft, hard in limits:
        try:
            resource.setrlimit(what, (soft, hard))
        except (ValueError, OSError):
            continue  # macOS knows no RLIMIT_AS; the parent's clock remains


# --- tokenizers -----------------------------------------------------------------------------------

_RUNS = ("a", " ", "\n", "0", "=", "é", "的", "🙂")
PROBE = (
    'The quick brown fox jumps over the lazy dog, and says: "it\'s 12,345.678!"\n\n\tdef f(x):\n'
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 []{}<>|&^%$#@~`_+-*/=;?\\\r\n"
    "Füße naïve Ελλάδα Привет שלום مرحبا हिन्दी ไทย 你好，世界 こんにちは 안녕 "
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301 \u00a0\u200b\ufeff"
) + "".join(char * 500 for char in _RUNS)


def check_tokenizer(payload: bytes) -> dict[str, Any]:
    """Load a tokenizer.json, and use it once in every way it will be used."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(payload.decode())
    for special in (False, True):
        ids = tokenizer.encode(PROBE, add_special_tokens=special).ids
        tokenizer.decode(ids, skip_special_tokens=special)
    for text in ("", "a", " ", "\n"):
        tokenizer.decode(tokenizer.encode(text).ids)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for number in sorted(vocabulary.values())[:: max(len(vocabulary) // 500, 1)]:
        tokenizer.id_to_token(number)
        tokenizer.decode([number])
    return {"tokens": len(ids)}


# --- chat templates -------------------------------------------------------------------------------

_DENIED = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.")


def _deny(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, behind the sandbox: nothing is opened but the library's own modules."""
    listing = event == "os.listdir"
    if listing or (event == "open" and arguments[1] in ("r", "rb")):
        path = str(arguments[0])
        own = path.startswith(tuple(place for place in sys.path if place))
        if own and (listing or path.endswith((".py", ".pyc", ".so"))):
            return
    elif event != "open" and not event.startswith(_DENIED):
        return
    raise PermissionError(f"{event} is not for templates")


def render_template(payload: bytes) -> dict[str, Any]:
    """Render a chat template with the names that transformers gives it."""
    import datetime

    import jinja2.ext
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant said; for rendering it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    task = json.loads(payload)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    sys.addaudithook(_deny)
    try:
        parts, length = [], 0
        for part in environment.from_string(task["template"]).generate(**task["names"]):
            parts.append(part)
            length += len(part)
            if length > task["most"]:
                return {"error": f"more than {task['most']} characters came out"}
        return {"text": "".join(parts)}
    except (SecurityError, PermissionError) as error:
        return {"refused": str(error)[:2000]}
    except RecursionError:
        return {"error": "nested too deeply"}


TASKS = {"tokenizer": check_tokenizer, "template": render_template}


def main(arguments: list[str]) -> None:
    task, cpu_seconds, memory, *paths = arguments
    sys.path.extend(paths)
    limit(int(cpu_seconds), int(memory))
    payload = sys.stdin.buffer.read()
    try:
        answer = TASKS[task](payload)
    except MemoryError:
        answer = {"error": "out of memory"}
    except BaseException as error:  # a panic of Rust is no Exception
        answer = {"error": str(error)[:2000] or type(error).__name__}
    view = memoryview(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))
    while view:
        view = view[os.write(1, view) :]
    os._exit(0)  # no destructor of a foreign library


if __name__ == "__main__":
    main(sys.argv[1:])
