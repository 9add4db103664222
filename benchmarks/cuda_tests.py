"""Every test that needs the device, one process a file: an error that leaves the device unusable
must not take the tests of other files with it. On a CPU they are only collected.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cuda_results import ROOT, Report
from cuda_shapes import begin, parser

MARK = "mark.gpu"
KINDS = ("tests", "failures", "errors", "skipped")
SHOWN = 600  # characters of a failure


def main() -> int:
    asked = parser(__doc__ or "").parse_args()
    report, _ = begin(asked)
    ends = time.monotonic() + asked.limit - 10
    files: dict[str, Any] = {}
    for path in with_device_tests():
        left = ends - time.monotonic()
        if left < 20:
            files[path] = {"says": "not run: no time left", "errors": 1}
        elif asked.device == "cpu":
            files[path] = collected(path)
        else:
            files[path] = one(path, left)
        report.put("files", files, says=f"{path}: {files[path]}")
    failed = summary(report, files)
    report.finish()
    return int(failed > 0)


def with_device_tests() -> list[str]:
    """Files of tests that hold one marked `gpu`; those in the folder of their own first."""
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text("utf-8")]
    found.sort(key=lambda p: (p.parent.name != "gpu", p))
    return [str(p.relative_to(ROOT)) for p in found]


def pytest(path: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *options, path]


def collected(path: str) -> dict[str, Any]:
    done = subprocess.run(
        pytest(path, "--collect-only"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        return {"says": (done.stdout + done.stderr)[-SHOWN:], "errors": 1}
    return {"collected": len(names)}


def one(path: str, limit: float) -> dict[str, Any]:
    """Run one file; counts, seconds, and what failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = pytest(path, "-q", "--tb=short", "--durations=5", f"--junitxml={result}")
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"says": f"stopped after {limit:.0f} s", "errors": 1}
        if not result.exists():
            return {"says": f"pytest ended with {process.returncode}", "errors": 1}
        figures = read(result)
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def read(result: Path) -> dict[str, Any]:
    """Counts and failures of a file in JUnit's format."""
    root = ElementTree.parse(result).getroot()
    suites = list(root.iter("testsuite"))
    counts: dict[str, Any] = {
        kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in KINDS
    }
    failed = {
        case.get("name", ""): (bad.text or bad.get("message", ""))[-SHOWN:]
        for case in root.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    }
    return counts | ({"failed": failed} if failed else {})


def summary(report: Report, files: dict[str, Any]) -> int:
    """Totals; returns how many tests, or files, went wrong."""
    totals = {kind: sum(found.get(kind, 0) for found in files.values()) for kind in KINDS}
    failed = totals["failures"] + totals["errors"]
    if report.device == "cpu":
        report.put("collected", sum(found.get("collected", 0) for found in files.values()))
        return failed
    report.put("skipped", totals["skipped"])
    report.put("passed", totals["tests"] - failed - totals["skipped"])
    report.put("failed", failed)
    return failed


if __name__ == "__main__":
    sys.exit(main())
