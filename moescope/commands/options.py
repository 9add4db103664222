"""Options that several verbs share, and how they become values."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moescope.errors import MoescopeError


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="a checkpoint folder, org/name from the local hub cache, or demo",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mlx"))
    where.add_argument(
        "--devices",
        type=names,
        default=(),
        metavar="LIST",
        help="split the layers over several, e.g. cuda:0,cuda:1",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument(
        "--max-context",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens a lane can hold (default %(default)s, at most the model's context)",
    )


def add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="T", help="raw text; - reads standard input")
    group.add_argument(
        "--prompt-ids", metavar="IDS", help="token ids, e.g. 1,2,3; no tokenizer needed"
    )
    group.add_argument("--chat", action="store_true", help="apply the model's chat template")
    group.add_argument("--system", metavar="T", help="a system message (with --chat)")
    group.add_argument(
        "--messages", metavar="FILE", help='JSON: [{"role": "user", "content": "..."}, ...]'
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="default %(default)s"
    )
    group.add_argument(
        "--temperature", type=ratio, default=0.0, metavar="T", help="default 0: greedy"
    )
    group.add_argument("--top-k", type=natural, default=0, metavar="N", help="0: off")
    group.add_argument("--top-p", type=share, default=1.0, metavar="P")
    group.add_argument("--min-p", type=share, default=0.0, metavar="P")
    group.add_argument("--seed", type=natural, default=0, metavar="S", help="default %(default)s")


def add_recording(
    parser: argparse.ArgumentParser, *, required: bool = False, record: str = "weights"
) -> None:
    group = parser.add_argument_group("recording")
    group.add_argument("-o", "--output", metavar="FILE", required=required, help="record here")
    group.add_argument(
        "--record",
        default=record,
        choices=("ids", "weights", "logits"),
        help=f"default {record}; with logits, any variant can be computed from the file alone",
    )
    group.add_argument("--redact", action="store_true", help="record no token ids and no text")
    group.add_argument("--durable", action="store_true", help="sync every commit to the disk")
    group.add_argument("--force", action="store_true", help="replace FILE if it exists")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def positive(text: str) -> int:
    return _number(text, 1)


def natural(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= 2**53:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least}, found {text[:40]!r}"
        )
    return value


def ratio(text: str) -> float:
    return _real(text, 1e6)


def share(text: str) -> float:
    return _real(text, 1.0)


def _real(text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected a number from 0 to {most:g}, found {text[:40]!r}"
        )
    return value


def sampling_of(args: argparse.Namespace) -> Any:
    from moescope.engine.protocol import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")
    return Sampling(**{name: getattr(args, name) for name in names})


def prompt_of(args: argparse.Namespace) -> dict[str, Any]:
    """The prompt as keywords of `protocol.Generate`: one of prompt_ids, messages, prompt."""
    given = [n for n in ("prompt", "prompt_ids", "messages") if getattr(args, n) is not None]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise MoescopeError(f"expected one prompt, found {names}")
    if not given:
        raise MoescopeError("no prompt", hint="--prompt 'Once upon a time', or --prompt -")
    if args.prompt_ids is not None:
        return {"prompt_ids": _ids(args.prompt_ids)}
    if args.messages is not None:
        return {"messages": _messages(Path(args.messages), args.system)}
    text = _standard_input() if args.prompt == "-" else args.prompt
    if args.chat or args.system is not None:
        system = [("system", args.system)] if args.system is not None else []
        return {"messages": (*system, ("user", text))}
    return {"prompt": text}


def _standard_input() -> str:
    if sys.stdin is None:
        raise MoescopeError("--prompt -: standard input is closed", hint="--prompt 'Once'")
    try:
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MoescopeError(f"--prompt -: expected text, found {type(error).__name__}") from None


def _ids(text: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in parts):
        raise MoescopeError(f"--prompt-ids: expected numbers such as 1,2,3, found {text[:60]!r}")
    return tuple(int(part) for part in parts)


def _messages(path: Path, system: str | None) -> tuple[tuple[str, str], ...]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.loads(file.read(4 << 20))
    except OSError as error:
        raise MoescopeError(f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise MoescopeError(f"{path.name}: expected JSON") from None
    shape = 'a list of {"role": "...", "content": "..."}'
    if not isinstance(value, list) or not value:
        raise MoescopeError(f"{path.name}: expected {shape}")
    found: list[tuple[str, str]] = [("system", system)] if system is not None else []
    for index, item in enumerate(value):
        role, content = (
            (item.get("role"), item.get("content")) if isinstance(item, dict) else (0, 0)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise MoescopeError(f"{path.name}: message {index}: expected {shape}")
        found.append((role, content))
    return tuple(found)


def model_of(name: str | None) -> str:
    """The path or hub name of a model; `demo`, or none at all, is the embedded one."""
    if name is None or (name == "demo" and not Path(name).exists()):
        from moescope.demo import CHECKPOINT

        return str(CHECKPOINT)
    return name


def request_of(args: argparse.Namespace, **more: Any) -> Any:
    from moescope.engine.protocol import LoadRequest

    return LoadRequest(
        model=model_of(args.model),
        device=args.device,
        devices=args.devices,
        dtype=args.dtype,
        max_context=args.max_context,
        beside=model_of(args.beside) if getattr(args, "beside", "") else "",
        **more,
    )


def print_json(document: dict[str, Any]) -> None:
    """One JSON document: ASCII only, so that no byte of it can act on a terminal."""
    json.dump({"schema": 1, **document}, sys.stdout, ensure_ascii=True, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def plain(value: Any) -> str:
    """A value for people: None as a dash, everything printable."""
    from moescope.safety import printable

    return "-" if value is None else printable(str(value))
