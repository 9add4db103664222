"""Checkpoints are written once per session; `make conformance` collects its rows into files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("conformance")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints of this session are."""
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """By family, rows that conformance tests append to; a family's file is written if all of its
    rows ran and held."""
    from tests.oracle.matrix import BY_FAMILY, rows

    found: dict[str, list[dict[str, Any]]] = {}
    yield found
    for family, of_family in found.items():
        if len(of_family) == len(list(rows(BY_FAMILY[family]))):
            write_results(family, of_family)


def write_results(family: str, found: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    from tests.families import MLX

    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    found = sorted(found, key=lambda row: (row["case"], row["kind"], row["what"]))
    lines = ",\n  ".join(json.dumps(row) for row in found)
    oracle = "mlx-lm" if family in MLX else "transformers"
    used = {name: version(name) for name in ("torch", oracle)}
    RESULTS.mkdir(exist_ok=True)
    text = f'{{"versions": {json.dumps(used)},\n "rows": [\n  {lines}\n]}}\n'
    (RESULTS / f"{family}.json").write_text(text)
