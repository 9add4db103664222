"""The benchmarks of the screen, each a program of its own; they write their own results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from asked import Asked

Figures = dict[str, Any]
PROGRAMS = ("screen_start", "screen_map", "screen_redraw", "screen_cost")


def run(asked: Asked) -> Figures:
    """Exit codes: 1 says that a target was missed."""
    here = Path(__file__).parent
    return {
        "exit_codes": {
            name: subprocess.run(
                [sys.executable, str(here / f"{name}.py")], stdout=sys.stderr, check=False
            ).returncode
            for name in PROGRAMS
        }
    }
