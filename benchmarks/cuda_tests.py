"""Every test that needs the device, file by file, with several workers where pytest-xdist is there:
most of the time goes into compiling kernels. A test that fails is run again in a process of its
own, because an error can leave the device unusable for those after it; both results are told. On a
CPU tests are only collected.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cuda_results import ROOT, Report
from cuda_shapes import begin, parser

MARK = "mark.gpu"
KINDS = ("tests", "failures", "errors", "skipped")
SHOWN = 600  # characters of a failure
TEST_LIMIT = 300  # seconds: most of them compile
WORKERS = 8
AGAIN = 8  # tests of a file that are run alone after they failed


def main() -> int:
    asks = parser(__doc__ or "")
    asks.add_argument("--only", default="", help="files whose name holds this")
    asks.add_argument("--without", help="but not those whose name holds this")
    asked = asks.parse_args()
    report, _ = begin(asked)
    ends = time.monotonic() + asked.limit - 10
    files: dict[str, Any] = {}
    for path in with_device_tests():
        if asked.only not in path or (asked.without and asked.without in path):
            continue
        if ends - time.monotonic() < 20:
            files[path] = {"says": "not run: no time left", "errors": 1}
        elif asked.device == "cpu":
            files[path] = collected(path)
        else:
            files[path] = one(path, ends)
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


def one(path: str, ends: float) -> dict[str, Any]:
    """Run one file; counts, seconds, what failed, and what of it passes alone."""
    began = time.monotonic()
    limit: tuple[str, ...] = ()
    if find_spec("pytest_timeout"):  # from a thread: a call that waits for the device hears nothing
        limit = ("--timeout", str(TEST_LIMIT), "--timeout-method", "thread")
    workers = min(WORKERS, os.cpu_count() or 1) if find_spec("xdist") else 0
    found = ran(path, ends, *limit, *(["-n", str(workers)] if workers > 1 else []))
    failed = list(found.get("failed", {}))
    for name in failed[:AGAIN]:
        if time.monotonic() > ends - 30:
            break
        alone = ran(f"{path}::{name}", ends, *limit)
        passed = alone.get("tests") == 1 and not alone["failures"] and not alone["errors"]
        found.setdefault("alone", {})[name] = "passed" if passed else "failed"
    return found | {"seconds": round(time.monotonic() - began, 1)}


def ran(what: str, ends: float, *options: str) -> dict[str, Any]:
    """Counts and failures of a file or a test."""
    left = max(5.0, ends - time.monotonic())
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = pytest(what, "--tb=short", "--durations=5", f"--junitxml={result}", *options)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            return {"says": f"stopped after {left:.0f} s", "errors": 1}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not result.exists():
            return {"says": f"pytest ended with {process.returncode}", "errors": 1}
        return read(result)


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
