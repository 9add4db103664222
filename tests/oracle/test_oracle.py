"""Against transformers, on every commit: one config of each family (`make conformance`: all)."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from moescope.engine import families
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from moescope.errors import MoescopeError
from tests.oracle import harness
from tests.oracle.checks import BY_ID, Row, rows, run
from tests.oracle.conftest import RESULTS
from tests.oracle.matrix import ALL, CASES, EXEMPT, FIRST, MUTANTS, REFUSED_EDITS

_FIRST = {case.id for case in FIRST}
_ROWS = [row for row in rows() if row.case in _FIRST]
_SAMPLED = [row for row in _ROWS if row.kind != "mutant"]
# every mutant once, on the first of its cases that is not the only one to show it
_SAMPLED += [
    Row("mutant", mutant.cases[number % len(mutant.cases)], mutant.name)
    for number, mutant in enumerate(MUTANTS)
]


@pytest.mark.parametrize("row", _SAMPLED, ids=lambda row: row.id)
def test_row(row: Row, folder: Path) -> None:
    found = run(row, folder)
    assert found["ok"], found


def test_results_cover_the_matrix() -> None:
    """The committed results are of this very matrix, and all of them held."""
    held = {(r["kind"], r["case"], r["what"]): r["ok"] for r in _results()}
    assert set(held) == {(row.kind, row.case, row.what) for row in rows()}
    assert all(held.values())


def test_results_differ_by_rounding_only() -> None:
    float32 = [row for row in _results() if row["kind"] == "float32"]
    assert {row["case"] for row in float32} == set(ALL)
    for row in float32:
        assert row["distinct_tokens"] >= 8 and row["router_logit_spread"] >= 2
        assert row["largest_weight_difference"] <= harness.WEIGHTS
        assert row["largest_logit_difference"] <= harness.LOGITS


def _results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"]  # type: ignore[no-any-return]


def test_two_cases_of_each_family() -> None:
    for model_type in families.SUPPORTED:
        assert len([case for case in CASES if case.family == model_type]) >= 2


def test_every_field_a_family_sets_has_a_mutant() -> None:
    """A field off its default must be one that some mutant flips in that case, or be exempt."""
    for case in CASES:
        config = json.loads(harness.model_of(case).config.to_json_string(use_diff=False))
        spec = families.build(config)
        flipped = {name for mutant in MUTANTS if case.id in mutant.cases for name in mutant.fields}
        unseen = _set_fields(spec) - flipped - set(EXEMPT)
        assert not unseen, (case.id, sorted(unseen))


def _set_fields(value: Any) -> set[str]:
    """`Class.field` for every field that is off its default, or has none, in a spec."""
    found: set[str] = set()
    for f in fields(value):
        held = getattr(value, f.name)
        if held != f.default:
            found.add(f"{type(value).__name__}.{f.name}")
        for item in held if isinstance(held, tuple) else (held,):
            if is_dataclass(item):
                found |= _set_fields(item)
    return found


@pytest.mark.parametrize(
    ("case", "key", "value", "named"), REFUSED_EDITS, ids=lambda value: str(value)
)
def test_a_config_of_another_model_does_not_load(
    case: str, key: str, value: Any, named: str, folder: Path, tmp_path: Path
) -> None:
    path = harness.write(BY_ID[case], tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert key in config and config[key] != value
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(MoescopeError, match=named.replace(".", r"\.")):
        load_model(LoadRequest(str(path), device="cpu"))
