"""What the steps of `metal_run.py` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, Any]


def begin(
    says: str | None, *names: str, **options: Any
) -> tuple[argparse.Namespace, Callable[[Figures], None]]:
    """The arguments of a step, and what writes its figures: whole files, so that a step that is cut
    short has what it had. `names` are positional arguments, `options` integers by default."""
    parser = argparse.ArgumentParser(description=(says or "").splitlines()[0])
    for name in names:
        parser.add_argument(name)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()

    def put(figures: Figures) -> None:
        beside = asked.out.with_suffix(".part")
        beside.write_text(json.dumps(figures, indent=1) + "\n")
        beside.replace(asked.out)

    return asked, put
