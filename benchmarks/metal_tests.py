"""The tests that `make metal` runs: those whose subject runs on Metal there.

Where torch is missing, as on a Mac it usually is, files that need it are left out and named.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from metal_steps import ROOT, Figures, begin

FILES = (
    "tests/kernels/test_mlx_router.py",
    "tests/engine/test_mlx_alone.py",
    "tests/engine/test_mlx_decoder.py",
    "tests/engine/test_mlx_differences.py",
)
KINDS = ("tests", "failures", "errors", "skipped")


def main() -> int:
    asked, put = begin(__doc__)
    files = FILES[:1] if asked.tiny else FILES
    found: dict[str, Figures] = {}
    for name in files:
        if needs_torch(name):
            found[name] = {"left out": "torch is not installed"}
        else:
            found[name] = run(name, "-k poisoned" if asked.tiny else "")
        print(f"{name}: {found[name]}", flush=True)
        failed = sum(f.get("failures", 0) + f.get("errors", 0) for f in found.values())
        passed = sum(f.get("tests", 0) - f.get("skipped", 0) for f in found.values()) - failed
        put({"failed": failed, "passed": passed, "files": found})
    return int(failed > 0)


def needs_torch(name: str) -> bool:
    """Whether a file of tests cannot be imported here for want of torch."""
    module = name.removesuffix(".py").replace("/", ".")
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode != 0 and "No module named 'torch" in done.stderr


def run(name: str, only: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", name, f"--junitxml={report}"]
        command += only.split()
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        if not report.exists():
            return {"errors": 1, "says": f"pytest ended with {done.returncode}"}
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        return {kind: sum(int(s.get(kind, 0)) for s in suites) for kind in KINDS}


if __name__ == "__main__":
    sys.exit(main())
