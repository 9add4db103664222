"""Recordings and exports that end badly: forked from a process that has imported everything.

Run as a script: `crash.py kill|full|export FOLDER RUNS SEED`. Prints one JSON object of what went
wrong, empty lists where nothing did. A process of its own, because pytest's has threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moescope.errors import ExitCode, MoescopeError
from moescope.trace import output as output_module
from moescope.trace.frames import TraceEvent
from moescope.trace.store import TraceReader, TraceWriter
from tests.trace.samples import a_frame, a_meta, differences, record_trace

FRAMES = [a_frame(position) for position in range(120)]
output_module.CHUNK_FRAMES = 40  # chunks are made as often as in a much longer recording


def record_all(path: Path, tell: Callable[[int], None]) -> None:
    """Record every frame, telling how many are acknowledged whenever that changes."""
    told = 0
    with TraceWriter(path, a_meta()) as writer:
        writer.event(TraceEvent("prompt", {"text": "Once"}))
        for frame in FRAMES:
            writer.append(frame)
            writer.flush()  # as an engine leaves the writer time
            if writer.acknowledged != told:
                told = writer.acknowledged
                tell(told)
        writer.flush()
        tell(writer.acknowledged)


def forked(
    work: Callable[[Callable[[int], None]], None], patience: float | None, after: int = 0
) -> int:
    """Run `work` in a child; the last number it told.

    It is killed `patience` seconds after it has told `after` or more; without patience, never.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        code = 1
        try:
            work(lambda number: os.write(write_end, number.to_bytes(4, "little")) and None)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    told = b""
    while int.from_bytes(told[-4:], "little") < after and (part := os.read(read_end, 4)):
        told += part
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    while part := os.read(read_end, 1 << 16):
        told += part
    os.close(read_end)
    _, status = os.waitpid(child, 0)
    if patience is None and status != 0:
        raise RuntimeError(f"the child ended with status {status}")
    return int.from_bytes(told[-4:], "little") if told else 0


def what_is_wrong(path: Path, acknowledged: int) -> str | None:
    """Whether the file opens and holds what was acknowledged, bit for bit."""
    try:
        with TraceReader.open(path) as reader:
            frames = list(reader.frames())
            if reader.problems:
                return f"problems: {reader.problems}"
    except MoescopeError as error:
        # Killed before the first commit there is no trace yet, and nothing was promised.
        return None if acknowledged == 0 else f"does not open: {error.message}"
    if len(frames) < acknowledged:
        return f"{acknowledged} acknowledged, {len(frames)} read"
    odd = [i for i, frame in enumerate(frames) if differences(frame, FRAMES[i])]
    return f"frames {odd} differ" if odd else None


def kill(folder: Path, runs: int, chance: random.Random) -> dict[str, object]:
    """Every fourth recording is killed while it starts, the others from some frame on."""
    started = time.monotonic()
    assert forked(lambda tell: record_all(folder / "whole", tell), None) == len(FRAMES)
    whole = time.monotonic() - started
    wrong, acknowledged = [], []
    for run in range(runs):
        path = folder / f"{run}.moetrace"
        after = chance.randrange(1, len(FRAMES)) if run % 4 else 0
        patience = chance.uniform(0, whole / 30)
        told = forked(lambda tell, path=path: record_all(path, tell), patience, after)  # type: ignore[misc]
        acknowledged.append(told)
        fault = what_is_wrong(path, told)
        if fault:
            wrong.append(f"{patience:.4f} s after frame {after}: {fault}")
    return {"wrong": wrong, "acknowledged": acknowledged}


def full(folder: Path, runs: int, chance: random.Random) -> dict[str, object]:
    """Recordings that may write only so many bytes to a file."""
    wrong, acknowledged = [], []
    for run in range(runs):
        path = folder / f"{run}.moetrace"
        limit = chance.randrange(60_000, 200_000)

        def work(tell: Callable[[int], None], path: Path = path, limit: int = limit) -> None:
            writer = TraceWriter(path, a_meta())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                for frame in FRAMES:
                    writer.append(frame)
                    writer.flush()
                writer.close()
            except MoescopeError as error:
                kept = writer.acknowledged
                expected = f"recording stopped at token {kept}; the file is good"
                if error.code != ExitCode.OUTPUT or expected not in error.message:
                    raise
                writer.close()
                tell(kept)

        told = forked(work, None)
        acknowledged.append(told)
        fault = what_is_wrong(path, told)
        if fault:
            wrong.append(f"limit {limit}: {fault}")
    return {"wrong": wrong, "acknowledged": acknowledged}


def export(folder: Path, runs: int, chance: random.Random) -> dict[str, object]:
    """Exports over an existing file: killed at any time, the old one or the new one stands."""
    from moescope.trace.formats import convert

    source, target = folder / "x.moetrace", folder / "x.csv"
    record_trace(source, 60)

    def digest() -> str:
        return hashlib.sha256(target.read_bytes()).hexdigest()

    started = time.monotonic()
    convert(source, target)
    whole, new = time.monotonic() - started, digest()
    wrong, kept = [], 0
    for _ in range(runs):
        target.write_text("old")
        old = digest()
        patience = chance.uniform(0, 1.3 * whole)  # however busy the machine is by now
        forked(lambda tell: convert(source, target, force=True) and None, patience)
        if digest() not in (old, new):
            wrong.append(f"after {patience:.4f} s: neither the old file nor the new one")
        kept += digest() == old
        whole *= 1.2 if digest() == old else 0.85
    return {"wrong": wrong, "kept_old": kept}


if __name__ == "__main__":
    job, place, count, seed = sys.argv[1:]
    jobs = {"kill": kill, "full": full, "export": export}
    print(json.dumps(jobs[job](Path(place), int(count), random.Random(int(seed)))))
