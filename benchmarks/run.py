"""`make bench`: everything in one command, one process tree and one table at the end.

Steps write their results as they finish, so that a run that was ended goes on with --resume. The
weights are made once into --folder (a temporary folder, deleted at the end, unless it is given).
--quick goes through everything in a few minutes with figures that mean nothing, and writes them
elsewhere.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import decode
import families
import lanes
import loading
import machine
import measure
import report
import router
import screens
import slow
import start
import tracing
import watching
import weights
from asked import Asked, quick
from shapes import Shapes

HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]
STEPS: dict[str, Callable[[Asked], Figures]] = {
    "start": start.run,
    "router": router.run,
    "families": families.run,
    "decode": decode.run,
    "lanes": lanes.run,
    "tracing": tracing.run,
    "watching": watching.run,
    "screens": screens.run,
    "loading": loading.run,
    "slow": slow.run,  # last: it needs memory that others leave in the system's cache
}
NO_MODEL = {"start", "router", "families", "screens"}
NOT_QUICK = {"screens"}  # they write among the real results


def main() -> int:
    asked, options = _arguments()
    results: Path = options.results
    results.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in STEPS if name in options.steps]
    todo = [n for n in wanted if not (options.resume and _done(results, n, asked))]
    failed = []
    if set(todo) - NO_MODEL:
        _make_weights(asked)
    for name in todo:
        measure.say(f"{name}:")
        began = time.monotonic()
        try:
            with measure.Meter() as meter:
                figures = STEPS[name](asked)
        except Exception as error:  # the other steps still have something to say
            measure.say(f"  {name} failed: {type(error).__name__}: {error}")
            failed.append(name)
            continue
        _write(results, name, asked, {**figures, "step": meter.figures()})
        measure.say(f"  {name}: {time.monotonic() - began:.0f} s")
    print(report.table(results))
    return 1 if failed else 0


def _arguments() -> tuple[Asked, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the weights here (two files of 3.8 GB)")
    parser.add_argument("--layers", type=int, help="default 4, with --quick 1")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--retries", type=int, help="of a noisy turn")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true", help="leave out steps with results")
    parser.add_argument(
        "--steps", type=lambda text: text.split(","), help="some of: " + ",".join(STEPS)
    )
    parser.add_argument("--results", type=Path, help="a folder for the JSON files")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = [n for n in STEPS if not (options.quick and n in NOT_QUICK)]
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, found {', '.join(unknown)}")
    if options.results is None:
        temporary = Path(tempfile.gettempdir()) / "moescope-bench-quick"
        options.results = temporary if options.quick else machine.RESULTS
    folder = options.folder or Path(_temporary())
    asked = quick(folder) if options.quick else Asked(folder)
    if options.layers is not None:
        asked = replace(asked, shapes=Shapes(layers=options.layers))
    for name in ("rounds", "tokens", "threads", "retries"):
        if (value := getattr(options, name)) is not None:
            asked = replace(asked, **{name: value})
    return asked, options


def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix="moescope-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make_weights(asked: Asked) -> None:
    began = time.monotonic()
    try:
        import gguf  # noqa: F401

        with_gguf = True
    except ImportError:
        with_gguf = False
        measure.say("gguf is not installed: llama.cpp is left out")
    weights.prepare(asked.model, asked.shapes, gguf=with_gguf)
    measure.say(f"weights: {time.monotonic() - began:.0f} s")


def _done(results: Path, name: str, asked: Asked) -> bool:
    """Whether this step has results of the same request, sources and machine."""
    try:
        found = json.loads((results / report.file_of(name)).read_text())
    except (OSError, ValueError):
        return False
    now = {"asked": asked.figures(), "machine": machine.describe(), "sources": _sources()}
    return all(found.get(name) == value for name, value in now.items())


@cache
def _sources() -> str:
    """Of every file that figures depend on: results of other sources are not gone on with."""
    total = hashlib.sha256()
    for place in (HERE, HERE.parent / "moescope"):
        for path in sorted(place.rglob("*")):
            if path.suffix in {".py", ".c", ".h"} and not path.name.startswith("cuda_"):
                total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _write(results: Path, name: str, asked: Asked, figures: Figures) -> None:
    document = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "sources": _sources(),
        "asked": asked.figures(),
        **figures,
    }
    made = results / f"{name}.part"
    made.write_text(json.dumps(document, indent=1) + "\n")
    made.replace(results / report.file_of(name))


if __name__ == "__main__":
    sys.exit(main())
