"""What every benchmark shares: the machine in general words, and where results go."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("textual", "numpy", "torch")
PEERS = ("transformers", "llama-cpp-python", "mlx-lm", "mlx")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions; no host names and no paths."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in (*PACKAGES, *PEERS):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _instructions() -> list[str]:
    """Which vector instructions the processor has, of those that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    held = set(lines[0].split(":", 1)[1].split()) if lines else set()
    return [name for name in INSTRUCTIONS if name in held]


def save(name: str, figures: dict[str, Any]) -> None:
    """Write `results/<name>.json` and print the figures."""
    RESULTS.mkdir(exist_ok=True)
    document = {"benchmark": name, "machine": describe(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
