"""The whole matrix against transformers: `make conformance`, which rewrites the results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.oracle.checks import Row, rows, run


@pytest.mark.conformance
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_row(row: Row, folder: Path, results: list[dict[str, Any]]) -> None:
    found = run(row, folder)
    assert found["ok"], found
    results.append(found)
