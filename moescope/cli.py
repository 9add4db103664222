"""The command line: which verbs there are, and what happens when one fails.

`moescope PATH` opens the screen; every other verb is headless. Results go to standard output, talk
to standard error. Verbs live in `commands/`; only the chosen one is imported, with what it needs.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moescope.errors import ExitCode, MoescopeError

# verb -> what it is for; the module is moescope.commands.<verb>
VERBS: dict[str, str] = {
    "open": "open the screen on a model or a trace (the verb may be left out)",
    "generate": "stream text",
    "trace": "stream text and record every routing decision",
    "compare": "run router variants side by side",
    "diagnose": "name the router that made a trace",
    "inspect": "say what a checkpoint is; loads no weights",
    "variants": "list router variants, and what each would change for a model",
    "check": "compare a model's routing with a golden trace, for CI",
    "balance": "how evenly a trace uses its experts, and what chance alone would show",
    "lint": "look for what is wrong with a trace: lost ranks, cut ids, impossible sums",
    "diff": "compare two traces of the same text",
    "convert": "turn a trace into Parquet, CSV or JSONL, and back",
    "replay": "open a recorded trace on the screen; needs no model",
    "doctor": "versions, devices, terminal and folders, for bug reports",
}
SCREENS = ("open", "replay")
FILLING = (*SCREENS, "trace", "convert")  # verbs whose work is not on standard output
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EPILOG = """examples:
  moescope                                    the embedded demo model
  moescope path/to/model                      a folder, or org/name in the local hub cache
  moescope generate MODEL --prompt 'Once'     text on standard output
  moescope trace MODEL --prompt 'Once' -o run.moetrace
  moescope compare MODEL --variant trained --variant softmax_over_selected --prompt 'Once'
  moescope diagnose run.moetrace --model MODEL
  moescope replay run.moetrace

exit codes: 0 done, 1 found something, 2 usage, 3 checkpoint, 4 trace, 5 memory or device,
6 output, 7 refused for safety, 70 a bug of ours, 128+n ended by signal n"""


def verb_of(arguments: Sequence[str]) -> str | None:
    """The verb of a command line; `open` where none is named, None for --help and --version."""
    for argument in arguments:
        if argument in ("-h", "--help", "--version"):
            return None
        if argument != "--debug":
            return argument if argument in VERBS else "open"
    return "open"


def opens_a_screen(arguments: Sequence[str]) -> bool:
    helps = any(argument in ("-h", "--help") for argument in arguments)
    return not helps and verb_of(arguments) in SCREENS


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process. Never raises; returns the exit code."""
    debug = "--debug" in arguments
    try:
        if sys.stdout is None:
            _without_output(arguments)
        code = _dispatch([a for a in arguments if a != "--debug"])
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse
        return end.code if isinstance(end.code, int) else int(ExitCode.USAGE)
    except MoescopeError as error:
        if debug:
            raise
        return complain(error.message, error.hint, error.code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): end as silently as a signal would have.
        _mute()
        return 141
    except MemoryError:
        return complain("out of memory", "a smaller --dtype or --max-context", ExitCode.RESOURCES)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in FULL:
            _mute()
            return complain(f"output: {error.strerror}".lower(), code=ExitCode.OUTPUT)
        return _bug(error, arguments)


def _without_output(arguments: Sequence[str]) -> None:
    """Standard output is closed, as with >&-: an error for what only prints, nothing to others."""
    if verb_of(arguments) not in FILLING:
        raise MoescopeError("output: standard output is closed", code=ExitCode.OUTPUT)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def _mute() -> None:
    """What is still to be written goes nowhere, so that the interpreter's end cannot fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    verb = verb_of(arguments)
    if verb is None:
        _top_parser().parse_args(arguments)
        return 0
    rest = arguments[1:] if arguments and arguments[0] == verb else arguments
    module = importlib.import_module(f"moescope.commands.{verb}")
    prog = "moescope" if verb == "open" else f"moescope {verb}"
    parser = _Parser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(rest)
    if verb == "open":
        module.need_path(parsed.model)  # before what it would be opened on
    if verb in SCREENS:
        _need_terminal()
    return int(module.run(parsed))


def _need_terminal() -> None:
    """Keys come from standard input, and the screen is drawn on standard error."""
    seen = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    if not seen and "TEXTUAL_DRIVER" not in os.environ:
        raise MoescopeError(
            "the screen needs a terminal", hint="moescope --help, for the verbs without a screen"
        )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in the two lines that every other error has."""

    def error(self, message: str) -> NoReturn:
        raise MoescopeError(message, hint=f"{self.prog} --help")


def _top_parser() -> argparse.ArgumentParser:
    from moescope import __version__

    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="moescope",
        usage="moescope [PATH] | moescope VERB ...  (moescope VERB --help)",
        description=f"Watch a Mixture-of-Experts model route, token by token.\n\nverbs:\n{table}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moescope {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def complain(message: str, hint: str = "", code: int = ExitCode.USAGE) -> int:
    """Print an error as its two lines on standard error; returns `code`."""
    from moescope.safety import printable

    lines = f"moescope: {printable(message)}\n" + (f"Try: {printable(hint)}\n" if hint else "")
    sys.stderr.write(lines)
    return int(code)


def _bug(error: Exception, arguments: Sequence[str]) -> int:
    from moescope import reports

    path = reports.write(error, arguments)
    where = f"; a report is in {path}" if path else ""
    return complain(
        f"a bug of ours: {type(error).__name__}{where}",
        "the same command with --debug, and send the report to the project",
        ExitCode.BUG,
    )
