"""Tests of Triton kernels where Triton is to be had; and the Metal kernels' text, compiled once."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

MLX = ("test_metal_decoder.py", "test_metal_launch.py")
collect_ignore_glob = [] if find_spec("triton") else ["test_triton_*.py"]
collect_ignore_glob += [] if find_spec("mlx") else ["test_mlx_*.py", *MLX]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`metal_shim.build.compiled`, once for each text and flags, whichever worker asks first."""
    from tests.kernels.metal_shim import build

    folder = tmp_path_factory.getbasetemp().parent / "metal"
    folder.mkdir(exist_ok=True)

    def of(source: str, *flags: str, optimised: str = "-O1", program: bool = False) -> Path:
        named = "\n".join([source, *flags, optimised, str(program)])
        target = folder / hashlib.sha256(named.encode()).hexdigest()[:24]
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                build.compiled(source, target, *flags, optimised=optimised, program=program)
        return target

    return of
