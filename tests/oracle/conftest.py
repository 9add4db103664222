"""Checkpoints are written once per session; `make conformance` collects its rows into a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("conformance.json")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints of this session are."""
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows that conformance tests append to; written only if the whole matrix ran and held."""
    from importlib.metadata import version

    from tests.oracle.checks import rows

    found: list[dict[str, Any]] = []
    yield found
    if os.environ.get("PYTEST_XDIST_WORKER") or len(found) != len(list(rows())):
        return
    found.sort(key=lambda row: (row["case"], row["kind"], row["what"]))
    lines = ",\n  ".join(json.dumps(row) for row in found)
    used = {name: version(name) for name in ("torch", "transformers")}
    RESULTS.write_text(f'{{"versions": {json.dumps(used)},\n "rows": [\n  {lines}\n]}}\n')
