"""What a person with a Mac runs: `make metal`, or `python benchmarks/metal_run.py [STEP ...]`.

Tests on the hardware, parity of the Metal kernels with their twin and with the definition, and the
benchmark against mlx-lm with its share of the chip's bandwidth. Every step is a process of its own
with a time limit, and its figures go to `results/metal.json` at once; a step that is done for these
sources is skipped, so a run that was cut short is taken up again by the same command. No torch.

--tiny tries the programs in small shapes wherever MLX runs, and says that this was not Metal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT, KEPT = HERE.parent, HERE / "results"
SOURCES = ("moescope/kernels", "moescope/engine", "benchmarks/metal_*.py", "benchmarks/mlx_*.py")
PACKAGES = ("mlx", "mlx-lm", "numpy", "safetensors")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """`limit` is in seconds; a program of this folder writes figures to the file it is given."""

    says: str
    program: str
    arguments: tuple[str, ...] = ()
    limit: int = 900


# In order of what they are worth, should somebody stop half-way.
STEPS = {
    "tests": Step("the tests that mean something on Metal", "metal_tests.py"),
    "parity": Step("the kernels against their twin and the definition", "metal_parity.py"),
    "bandwidth": Step("what this chip can read", "metal_speed.py", ("bandwidth",), 300),
    "router": Step("the router alone", "metal_speed.py", ("router",), 300),
    "decode": Step("against mlx-lm, bfloat16", "metal_decode.py", ("--bits", "0"), 1800),
    "decode_4bit": Step("against mlx-lm, 4 bits", "metal_decode.py", ("--bits", "4"), 1800),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and what it must be: `sign` is `>=` or `<=`; "" where it is only told."""

    says: str
    path: tuple[str, ...]  # step, then keys of its figures
    sign: str = ""
    limit: float = 0.0


TARGETS = (
    Target("tests failed", ("tests", "failed"), "<=", 0),
    Target("rows routed otherwise than the definition", ("parity", "wrong_rows"), "<=", 0),
    Target("weights, largest difference from the twin", ("parity", "weight"), "<=", 1e-5),
    Target("gate and router in one launch, wrong rows", ("parity", "gate_wrong_rows"), "<=", 0),
    Target("functions of the kernels, ulp off at most", ("parity", "ulp"), "<=", 0.75),
    Target("router (1, 128, 8), µs", ("router", "1 128 8", "metal")),
    Target("router (1, 128, 8), × mlx-lm's operators", ("router", "1 128 8", "speedup"), ">=", 1.0),
    Target("gate in the same launch, × two launches", ("router", "gate 2048x128", "speedup")),
    Target("read bandwidth, GB/s", ("bandwidth", "gb_s")),
    *(
        Target(f"{name}: {says}", (step, *path), sign, limit)
        for step, name in (("decode", "bfloat16"), ("decode_4bit", "4 bits"))
        for says, path, sign, limit in (
            ("decode, × mlx-lm, trace written", ("ratio", "decode"), ">=", 1.0),
            ("first token, × mlx-lm's time", ("ratio", "first"), "<=", 1.1),
            ("peak memory, × mlx-lm's", ("ratio", "peak"), "<=", 1.1),
            ("share of the bandwidth", ("share",), "", 0.0),
        )
    ),
)


def main() -> int:
    asked = arguments()
    if asked.list:
        for name, step in STEPS.items():
            print(f"{name:12} {step.says}, at most {step.limit} s")
        return 0
    if (why := cannot_run(asked.tiny)) != "":
        print(f"metal_run: {why}", file=sys.stderr)
        return 1
    on = metal()
    failed = []
    for name in asked.steps:
        document = read(asked.out)
        if is_done(document, name, asked.tiny) and not asked.again:
            print(f"== {name}: done before, skipped (--again runs it)", flush=True)
            continue
        print(f"== {name}: {STEPS[name].says}", flush=True)
        figures, why = run(STEPS[name], asked.tiny)
        write(asked.out, name, figures, why, asked.tiny, on)
        if why:
            failed.append(name)
            print(f"== {name}: {why}", flush=True)
    print("\n" + verdict(read(asked.out)))
    if failed:
        print("did not end well: " + " ".join(failed))
    return int(bool(failed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="which steps (all of them)")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--out", type=Path, help="the file of the results (results/metal.json)")
    parser.add_argument("--again", action="store_true", help="also steps that are done")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a try of the programs")
    asked = parser.parse_args()
    if unknown := [name for name in asked.steps if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; --list prints them")
    asked.steps = asked.steps or list(STEPS)
    if asked.out is None:  # figures of small shapes say nothing and are not kept
        asked.out = (Path(tempfile.mkdtemp()) if asked.tiny else KEPT) / "metal.json"
    return asked


@cache
def metal() -> bool:
    """Whether MLX finds Metal here."""
    code = "import mlx.core as mx, sys; sys.exit(0 if mx.metal.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def cannot_run(tiny: bool) -> str:
    """Why not with this Python ("" if it can)."""
    found = subprocess.run([sys.executable, "-c", "import mlx.core"], capture_output=True)
    if found.returncode:
        return f"{sys.executable} cannot import mlx; `make metal` installs what is needed"
    if tiny or metal():
        return ""
    return "MLX finds no Metal here; --tiny tries the programs on its CPU backend"


def run(step: Step, tiny: bool) -> tuple[Figures, str]:
    """The figures a step wrote, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / step.program), *step.arguments, "--out", str(out)]
        command += ["--tiny"] if tiny else []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=step.limit, stdin=subprocess.DEVNULL
            )
            why = "" if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {step.limit} s"
        figures: Figures = json.loads(out.read_text()) if out.exists() else {}
    return figures, why


# --- results --------------------------------------------------------------------------------------


@cache
def digest() -> str:
    """Of every source file that figures depend on."""
    total = hashlib.sha256()
    for pattern in SOURCES:
        place = ROOT / pattern
        files = place.rglob("*") if place.is_dir() else ROOT.glob(pattern)
        for path in sorted(p for p in files if p.suffix in {".py", ".metal"}):
            total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


@cache
def describe() -> Figures:
    """The machine in general words; no names, no paths."""
    found = {"system": f"{platform.system()} {platform.machine()}", "macos": platform.mac_ver()[0]}
    code = "import mlx.core as mx, json; print(json.dumps(mx.device_info(), default=str))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode == 0:
        info = json.loads(asked.stdout)
        wanted = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
        found |= {key: info[key] for key in wanted if key in info}
    return {**found, "python": platform.python_version(), "packages": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> Figures:
    try:
        found: Figures = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}


def write(path: Path, name: str, figures: Figures, why: str, tiny: bool, on_metal: bool) -> None:
    """Put one step's figures among those of the others."""
    document = read(path)
    document |= {"benchmark": "metal", "machine": describe(), "metal": on_metal, "tiny": tiny}
    steps = document.setdefault("steps", {})
    steps[name] = {
        "date": time.strftime("%Y-%m-%d"),
        "sources": digest(),
        "tiny": tiny,
        "metal": on_metal,
        "failed": why,
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(path)


def is_done(document: Figures, name: str, tiny: bool) -> bool:
    """Whether there is a whole result of these sources and of this kind."""
    found = document.get("steps", {}).get(name, {})
    wanted = {"sources": digest(), "tiny": tiny, "metal": metal(), "failed": ""}
    return bool(found) and all(found.get(key) == value for key, value in wanted.items())


def verdict(document: Mapping[str, Any]) -> str:
    """Every target with its figure and PASS, MISS, told or not run; first of all, whether this was
    Metal."""
    steps = document.get("steps", {})
    lines = [judged(target, steps) for target in TARGETS]
    if steps and not all(step["metal"] for step in steps.values()):
        lines.insert(0, "This did not run on Metal: MLX's CPU backend, plain operators.")
    if any(step["tiny"] for step in steps.values()):
        lines.insert(0, "Small shapes: these figures say nothing.")
    return "\n".join(lines)


def judged(target: Target, steps: Mapping[str, Any]) -> str:
    step, *keys = target.path
    value: Any = steps.get(step, {}).get("figures", {})
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    known = isinstance(value, int | float) and value == value
    word = "not run"
    if known and not steps[step]["metal"]:
        word = "no Metal"
    elif known:
        met = value >= target.limit if target.sign == ">=" else value <= target.limit
        word = "told" if not target.sign else "PASS" if met else "MISS"
    found = f"{value:.4g}" if known else "-"
    wanted = f"{target.sign} {target.limit:g}" if target.sign else ""
    old = step in steps and steps[step]["sources"] != digest()
    note = "  (measured with other sources)" if known and old else ""
    return f"{word:8} {found:>9}  {wanted:>9}  {target.says}{note}"


if __name__ == "__main__":
    sys.exit(main())
