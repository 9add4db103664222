"""Versions, devices, terminal and folders: what a bug report needs. Reads no model."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sqlite3
import sys
from importlib import metadata
from typing import Any

from moescope.commands import options

PACKAGES = (
    "textual",
    "torch",
    "triton",
    "mlx",
    "numpy",
    "plotext",
    "safetensors",
    "tokenizers",
    "jinja2",
    "platformdirs",
    "pyarrow",
)
TERMINAL = ("TERM", "COLORTERM", "NO_COLOR", "TMUX", "SSH_CONNECTION", "LANG")
SAFE_SQLITE = (3, 50, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    facts = {
        "moescope": _moescope(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "terminal": _terminal(),
        "folders": _folders(),
    }
    if args.json:
        options.print_json(facts)
        return 0
    for title, rows in facts.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {options.plain(value)}")
    return 0


def _moescope() -> dict[str, Any]:
    from moescope import __version__

    sqlite = sqlite3.sqlite_version
    old = sqlite3.sqlite_version_info < SAFE_SQLITE
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "sqlite": f"{sqlite} (older than 3.50.2: open only traces you trust)" if old else sqlite,
        "cpus": os.cpu_count(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """What each backend can see; a backend that fails to import says so instead of failing us."""
    return {
        "cpu": _memory(),
        "native kernels": _native(),
        "cuda": _guarded(_cuda),
        "mlx": _guarded(_mlx),
    }


def _native() -> str:
    from moescope.kernels import native_ops

    if os.environ.get("MOESCOPE_NATIVE") == "0":
        return "switched off (MOESCOPE_NATIVE=0)"
    if native_ops.library() is None:
        return "not built (no C compiler at installation); torch decodes instead"
    return native_ops.available() or f"this CPU has no {native_ops.wanted_isa().decode()}"


def _guarded(probe: Any) -> str:
    try:
        return str(probe())
    except ImportError:
        return "not installed"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch {torch.__version__})"
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    free, total = torch.cuda.mem_get_info()
    return f"{', '.join(names)}; {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _mlx() -> str:
    import mlx.core as mx

    if not mx.metal.is_available():
        return "no Metal; runs on the CPU where asked for, slowly"
    facts = mx.device_info()
    most = int(facts.get("max_recommended_working_set_size", 0)) / 1e9
    return f"{facts.get('device_name', 'Metal')}; {most:.1f} GB for models"


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} cores, {pages / 1e9:.1f} GB"


def _terminal() -> dict[str, Any]:
    size = shutil.get_terminal_size()
    values: dict[str, Any] = {name: os.environ.get(name) for name in TERMINAL}
    if values["SSH_CONNECTION"]:
        values["SSH_CONNECTION"] = "yes"  # the addresses are nobody's business
    return {
        **values,
        "size": f"{size.columns}x{size.lines}",
        "encoding": sys.stdout.encoding,
        "is a terminal": sys.stdout.isatty(),
    }


def _folders() -> dict[str, Any]:
    from moescope import reports
    from moescope.engine.hub_cache import cache_folder

    def describe(path: Any) -> str:
        state = "missing" if not path.exists() else ""
        if path.exists() and not os.access(path, os.W_OK):
            state = "not writable"
        return f"{path}" + (f" ({state})" if state else "")

    return {"state": describe(reports.folder()), "hub cache": describe(cache_folder())}
