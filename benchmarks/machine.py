"""What every benchmark shares: the machine in general words, and where results go."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions; no host names and no paths."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("textual", "numpy", "torch")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(name: str, figures: dict[str, Any]) -> None:
    """Write `results/<name>.json` and print the figures."""
    RESULTS.mkdir(exist_ok=True)
    document = {"benchmark": name, "machine": describe(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
