"""Results of the GPU suite: one JSON file a step, written anew after every figure, and the targets
they are judged by. Imports no torch.

A result counts for the sources it was made with: `digest` stands for them, also where the copy has
no git history. Figures are nested dictionaries; `Target.path` is the way to one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "results"
SOURCES = ("moescope/kernels", "moescope/engine", "moescope/trace", "benchmarks/cuda_*.py")
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and what it must be: `sign` is `>=` or `<=`."""

    says: str
    step: str
    path: tuple[str, ...]
    sign: str
    limit: float


TARGETS = (
    Target("tests failed", "tests", ("failed",), "<=", 0),
    Target("tests of every family failed", "tests_families", ("failed",), "<=", 0),
    Target("OLMoE-1B-7B: share of bandwidth, traced", "olmoe", ("share", "traced"), ">=", 0.55),
    Target("Qwen3-30B-A3B: share of bandwidth, traced", "qwen3", ("share", "traced"), ">=", 0.55),
    Target("OLMoE-1B-7B: × transformers' best", "peers", ("over_best",), ">=", 3.0),
    Target("Qwen3-30B-A3B: × transformers' best", "peers_qwen3", ("over_best",), ">=", 3.0),
    Target("tracing (weights), cost", "tracing", ("cost", "weights"), "<=", 0.01),
    Target("tracing (logits), cost", "tracing", ("cost", "logits"), "<=", 0.02),
    Target("tracing, further graph nodes", "tracing", ("further_nodes",), "<=", 0),
    Target("4 lanes, over the bytes of their union", "lanes", ("over_union", "4"), "<=", 1.2),
    Target("4 shadow variants, × the step without", "lanes", ("shadows", "ratio"), "<=", 1.02),
    Target("router (1, 128, 8) in a graph, µs", "router", ("1 128 8", "ours"), "<=", 3.0),
    Target("router (1, 128, 8), × the torch chain", "router", ("1 128 8", "speedup"), ">=", 4.0),
    Target(
        "router (4096, 128, 8), × a bare copy", "router", ("4096 128 8", "over_copy"), "<=", 1.5
    ),
)


@cache
def digest() -> str:
    """Of every source file that figures depend on."""
    total = hashlib.sha256()
    for pattern in SOURCES:
        place = ROOT / pattern
        files = place.rglob("*") if place.is_dir() else ROOT.glob(pattern)
        for path in sorted(p for p in files if p.suffix in {".py", ".c", ".h"}):
            total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def commit() -> str | None:
    """The commit that is checked out, where git knows."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine in general words: GPU, processor, cores, memory, versions; no names, no paths."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **(_gpu() if device == "cuda" else {}),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "gpu_memory_gb": round(found.total_memory / 1e9, 1),
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(slots=True)
class Report:
    """One step's result, on disk after every `put`; `finished` once the step got to its end."""

    step: str
    folder: Path
    device: str
    tiny: bool
    figures: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    about: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: Any, says: str = "") -> None:
        """`says` is printed in place of the value."""
        self.figures[name] = value
        print(f"{self.step}: {name}: {says or _short(value)}", flush=True)
        self._write(finished=False)

    def finish(self) -> None:
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        if not self.about:
            self.about = {
                "benchmark": f"cuda_{self.step}",
                "machine": describe(self.device),
                "commit": commit(),
                "sources": digest(),
                "tiny": self.tiny,
            }
        document = {
            **self.about,
            "finished": finished,
            "seconds": round(time.monotonic() - self.began, 1),
            "figures": self.figures,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = place(self.step, self.folder)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(rounded(document), indent=2) + "\n")
        beside.replace(path)


def place(step: str, folder: Path) -> Path:
    return folder / f"cuda_{step}.json"


def read(step: str, *folders: Path) -> dict[str, Any] | None:
    """The result of `step` in the first of `folders` that has one."""
    for folder in folders:
        try:
            found: dict[str, Any] = json.loads(place(step, folder).read_text())
            return found
        except (OSError, ValueError):
            continue
    return None


def is_done(result: Mapping[str, Any] | None, tiny: bool) -> bool:
    """Whether `result` is a whole one, of these sources and of this kind."""
    return bool(
        result
        and result.get("finished")
        and result.get("sources") == digest()
        and result.get("tiny") == tiny
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    target: Target
    found: float | None
    word: str  # PASS, MISS, not run
    stale: bool  # measured with other sources


def judge(target: Target, result: Mapping[str, Any] | None) -> Verdict:
    value: Any = (result or {}).get("figures", {})
    for key in target.path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if result is None or not isinstance(value, int | float) or value != value:
        return Verdict(target, None, "not run", False)
    met = value >= target.limit if target.sign == ">=" else value <= target.limit
    return Verdict(target, value, "PASS" if met else "MISS", result.get("sources") != digest())


def table(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Every target with its measured value and PASS, MISS or not run."""
    lines = []
    for target in TARGETS:
        verdict = judge(target, results.get(target.step))
        found = "-" if verdict.found is None else f"{verdict.found:.4g}"
        wanted = f"{target.sign} {target.limit:g}"
        note = "  (measured with other sources)" if verdict.stale else ""
        lines.append(f"{verdict.word:8} {found:>9}  {wanted:>8}  {target.says}{note}")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Floats with six digits: more say nothing, and files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = json.dumps(rounded(value))
    return text if len(text) <= 400 else text[:400] + " …"
