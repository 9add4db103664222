"""The C router compiled from its source as it stands, so that no older build is tested."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from pathlib import Path

import moescope.kernels

NATIVE = Path(moescope.kernels.__file__).with_name("native")


def router_library(folder: Path) -> ctypes.CDLL | None:
    """None where there is no compiler; what was installed has to do then."""
    names = [*(sysconfig.get_config_var("CC") or "").split()[:1], "cc", "gcc", "clang"]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        return None
    target = folder / "librouter.so"
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    done = subprocess.run(
        [*command, str(NATIVE / "router.c"), "-o", str(target), "-lm"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))
