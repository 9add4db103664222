"""The GPU suite: `make gpu`, or `python benchmarks/cuda_run.py [STEP ...]` with the Python at hand.

Every step is a process of its own with a time limit, and writes its result at once; a step that is
done for these sources is skipped, so a run that was cut short is taken up again by the same
command. Ends with a table of targets. Installs nothing; needs torch, and pytest for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cuda_results as results

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Step:
    """`expected` and `limit` are seconds."""

    name: str
    says: str
    program: str
    arguments: tuple[str, ...] = ()
    expected: int = 60
    limit: int = 540


OLMOE, QWEN3 = ("--shape", "olmoe"), ("--shape", "qwen3")
# In order of what they are worth, should time run out.
STEPS = (
    Step("tests", "tests that need the device", "cuda_tests", ("--without", "families"), 240),
    Step("router", "the router alone", "cuda_router", (), 90, 300),
    Step("olmoe", "decode, OLMoE-1B-7B", "cuda_decode", OLMOE, 75, 300),
    Step("tracing", "what tracing costs", "cuda_tracing", OLMOE, 60, 300),
    Step("lanes", "1 to 8 lanes, shadow variants", "cuda_lanes", OLMOE, 120, 400),
    Step("qwen3", "decode, Qwen3-30B-A3B", "cuda_decode", QWEN3, 90, 400),
    Step("peers", "against transformers, OLMoE-1B-7B", "cuda_peers", OLMOE, 300),
    Step("families", "families with operators in torch", "cuda_families", (), 300),
    Step("tests_families", "every family's step", "cuda_tests", ("--only", "families"), 240),
    Step("kernels", "every kernel, and tiles around its own", "cuda_kernels", (), 150),
    Step("peers_qwen3", "against transformers, Qwen3-30B-A3B", "cuda_peers", QWEN3, 360),
    Step("prefill", "first token and loading", "cuda_prefill", OLMOE, 75, 300),
    Step("others", "vLLM and llama.cpp, where they are", "cuda_others", OLMOE, 15),
)
BY_NAME = {step.name: step for step in STEPS}


def main() -> int:
    asked = arguments()
    if asked.list:
        for step in STEPS:
            print(f"{step.name:12} {step.says:38} about {step.expected:3} s, at most {step.limit}")
        return 0
    began = time.monotonic()
    if asked.device == "cuda" and (why := no_device()):
        print(f"cuda_run: {why}", file=sys.stderr)
        return 1
    failed = []
    for step in [BY_NAME[name] for name in asked.steps]:
        done = results.read(step.name, asked.out, results.KEPT)
        if results.is_done(done, asked.tiny) and not asked.again:
            print(f"== {step.name}: done before, skipped (--again runs it)", flush=True)
            continue
        left = asked.budget - (time.monotonic() - began)
        if left < min(step.expected, asked.limit):
            print(f"== {step.name}: not started, {left:.0f} s are left", flush=True)
            continue
        print(f"== {step.name}: {step.says}", flush=True)
        if (code := run(step, asked, min(step.limit, asked.limit, left))) != 0:
            failed.append(step.name)
            print(f"== {step.name}: ended with {code}", flush=True)
    kept = () if asked.tiny else (results.KEPT,)
    found = {step.name: results.read(step.name, asked.out, *kept) for step in STEPS}
    note = "small shapes: these figures say nothing\n" if asked.tiny else ""
    print(f"\n{note}{results.table(found)}")
    if failed:
        print("did not end well: " + " ".join(failed))
    return bool(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="which steps (all of them)")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="also steps that are done")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all steps")
    parser.add_argument("--limit", type=float, default=540, help="seconds for a step, at most")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a try of the programs")
    asked = parser.parse_args()
    if unknown := [name for name in asked.steps if name not in BY_NAME]:
        parser.error(f"no step {unknown[0]!r}; --list prints them")
    asked.steps = asked.steps or [step.name for step in STEPS]
    if asked.out is None:  # figures of small shapes say nothing and are not kept
        asked.out = Path(tempfile.mkdtemp()) if asked.tiny else results.KEPT
    return asked


def no_device() -> str:
    """Why the suite cannot run with this Python ("" if it can)."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return {0: "", 3: "torch finds no CUDA device here"}.get(
        answer.returncode, f"{sys.executable} cannot import torch"
    )


def run(step: Step, asked: argparse.Namespace, limit: float) -> int:
    """Run one step; past `limit` seconds it is ended, with everything it started."""
    command = [sys.executable, str(HERE / f"{step.program}.py"), "--step", step.name]
    command += [*step.arguments, "--out", str(asked.out), "--device", asked.device]
    command += ["--limit", f"{limit:.0f}", *(["--tiny"] if asked.tiny else [])]
    paths = [str(results.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if asked.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        command, cwd=results.ROOT, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"== {step.name}: stopped after {limit:.0f} s", flush=True)
        return 124
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask first: a step ends what it started in sessions of their own."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, way)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


if __name__ == "__main__":
    sys.exit(main())
