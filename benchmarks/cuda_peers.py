"""Decode and first token against transformers: every experts_implementation, cached, graphed,
compiled; all on the same weights, in the same memory.

A worker process makes the weights once and measures mode after mode. One that fails is told; one
that hangs, or leaves the device unusable, ends its worker, and the rest goes on in another.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_clock as clock
import torch
from cuda_loops import Lanes, Traced
from cuda_shapes import begin, make, parser, prompt
from cuda_transformers import MODES, PROMPT, Mode, measure, parity, per_token

MAKING = 200  # seconds a worker may take to import, make weights and measure ours
GREETING = "result: "
SPARE = 20  # seconds of the limit left for ending well


def main() -> None:
    asks = parser(__doc__ or "")
    asks.add_argument("--worker", nargs="*", help="modes by number: be the worker of these")
    asked = asks.parse_args()
    if asked.worker is not None:
        work(asked, [MODES[int(number)] for number in asked.worker])
        return
    report, _ = begin(asked)
    ends = time.monotonic() + asked.limit - SPARE
    found: dict[str, Any] = {}
    left = list(MODES[:4] if asked.tiny else MODES)
    misses = 0
    while left and misses < 4 and time.monotonic() < ends:
        before = len(left)
        for mode, figures in watch(asked, left, ends):
            if mode is None:
                for name, value in figures.items():
                    report.put(name, value)
                continue
            left.remove(mode)
            found[mode.name] = figures
            report.put("transformers", found, says=f"{mode.name}: {figures}")
            best = max((f.get("tokens_per_second", 0) for f in found.values()), default=0)
            if best and "ours" in report.figures:
                report.put("over_best", report.figures["ours"]["traced"] / best)
        misses += len(left) == before
    for mode in left:
        found[mode.name] = {"says": "not run: no time left"}
    report.put("transformers", found)
    report.finish()


def watch(asked: Namespace, modes: Sequence[Mode], ends: float) -> Any:
    """Run `modes` in one worker; yields (mode, figures) as they come, and (None, figures) for what
    the worker has of its own. Ends with the worker, which is ended at a mode's limit."""
    numbers = [str(MODES.index(mode)) for mode in modes]
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", *numbers]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment()
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    waiting = list(modes)
    current: Mode | None = None  # None: the worker is still making its weights
    try:
        while True:
            limit = MAKING if current is None else current.limit
            try:
                line = lines.get(timeout=max(0.1, min(limit, ends - time.monotonic())))
            except queue.Empty:
                if current is not None:
                    yield current, {"says": f"stopped after {limit} s"}
                return
            if line is None:
                if current is not None:
                    yield current, {"says": f"its process ended with {process.wait()}"}
                return
            if not line.startswith(GREETING):
                print(line, end="", flush=True)
                continue
            name, figures = json.loads(line.removeprefix(GREETING))
            yield (None, figures) if name is None else (waiting.pop(0), figures)
            current = waiting[0] if waiting else None
            if not waiting:
                return
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """Nothing is fetched: kernels from the hub are looked for on this machine only."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


# --- the worker -----------------------------------------------------------------------------------


@torch.inference_mode()
def work(asked: Namespace, modes: Sequence[Mode]) -> None:
    _, shape = begin(asked)
    model = make(shape, asked.device)
    own: dict[str, Any] = {}
    if modes[0] is MODES[0]:  # the first worker
        own["ours"] = ours(model, asked)
        own["parity"] = guarded(lambda: parity(model, "eager"))
    tell(None, own)
    for mode in modes:
        figures = guarded(lambda mode=mode: measure(model, mode))
        tell(mode.name, figures)
        if asked.device == "cuda":
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError:  # an earlier error of the device stays for good
                os._exit(3)
        torch.compiler.reset()


def ours(model: Any, asked: Namespace) -> dict[str, float]:
    """The same figures of this project, bare and traced."""
    decoder = model.decoder(capacity=1024)
    ids = prompt(model, PROMPT)
    bare = Lanes(decoder, [ids])
    rates = {"bare": 1 / per_token(bare.step, asked.device)}

    def first() -> None:
        decoder.truncate(0, 0)
        int(decoder.run([0], [ids], record="weights").logits.argmax())

    rates["first_token_seconds"] = clock.median_time(first, asked.device, repeats=3)
    traced = Traced(model, decoder)
    rates["traced"] = 1 / per_token(lambda: traced.go(1), asked.device)
    traced.close()
    return rates


def tell(name: str | None, figures: dict[str, Any]) -> None:
    print(GREETING + json.dumps([name, figures]), flush=True)


def guarded(run: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = run()
        return found
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {"says": f"{type(error).__name__}: {str(error)[:300]} ({place})"}


if __name__ == "__main__":
    main()
