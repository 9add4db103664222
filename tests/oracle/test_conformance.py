"""The whole matrix against transformers: `make conformance`, which rewrites the results files.

`make conformance FAMILY=gpt_oss` is one family. Collected by case, so that a case that does not
build says so and stops nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import harness
from tests.oracle.checks import run
from tests.oracle.matrix import BY_FAMILY, rows

_WANTED = [family for family in os.environ.get("FAMILY", "").split(",") if family] or BY_FAMILY


@pytest.mark.conformance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [c for f in _WANTED for c in BY_FAMILY[f]], ids=lambda c: c.id)
def test_case(case: Any, folder: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    found = [run(row, folder) for row in rows([case])]
    wrong = [row for row in found if not row["ok"]]
    assert not wrong, "\n".join(map(str, wrong))
    results.setdefault(case.family, []).extend(found)
    harness.model_of.cache_clear()
