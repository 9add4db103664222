"""Against transformers, on every commit: a run of each family and a sample of the wrong specs that
must be noticed (`make conformance`: all of it). The committed results are of this very matrix."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moescope.engine import families
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from moescope.errors import MoescopeError
from tests.families import EXEMPT, MUTANTS, REFUSED_EDITS
from tests.oracle import flips, harness
from tests.oracle import mutants as generic
from tests.oracle.checks import run
from tests.oracle.conftest import RESULTS
from tests.oracle.matrix import BY_FAMILY, BY_ID, CASES, Row, mutants_of, rows, spec_of
from tests.tiny import FAMILIES

SAMPLE = 4


@pytest.mark.parametrize("family", BY_FAMILY)
def test_a_run_of_each_family(family: str, folder: Path) -> None:
    """Its first case agrees, and some wrong specs of it, which differ from family to family, do
    not. One test, for what it compares with takes longest."""
    case = BY_FAMILY[family][0]
    found = run(Row("float32", case.id, "longer-than-window"), folder)
    assert found["ok"], found
    names = list(mutants_of(case))
    first = list(BY_FAMILY).index(family)
    for number in range(SAMPLE):
        name = names[(first + number * len(names) // SAMPLE) % len(names)]
        found = run(Row("mutant", case.id, name), folder)
        assert found["ok"], found


_MORE = [
    row
    for family in FAMILIES
    for row in rows(BY_FAMILY[family][:1])
    if row.kind in ("layout", "bfloat16")
]


@pytest.mark.parametrize("row", _MORE, ids=lambda row: row.id)
def test_layouts_and_bfloat16(row: Row, folder: Path) -> None:
    found = run(row, folder)
    assert found["ok"], found


@pytest.mark.parametrize("family", BY_FAMILY)
def test_results_cover_the_matrix(family: str) -> None:
    """The committed results are of this very matrix, and all of them held."""
    held = {(r["kind"], r["case"], r["what"]): r["ok"] for r in _results(family)}
    assert set(held) == {(row.kind, row.case, row.what) for row in rows(BY_FAMILY[family])}
    assert all(held.values())


@pytest.mark.parametrize("family", BY_FAMILY)
def test_results_differ_by_rounding_only(family: str) -> None:
    float32 = [row for row in _results(family) if row["kind"] == "float32"]
    assert {row["case"] for row in float32} == {case.id for case in BY_FAMILY[family]}
    for row in float32:
        assert row["distinct_tokens"] >= 8 and row["router_logit_spread"] >= 2
        assert row["largest_weight_difference"] <= harness.WEIGHTS
        assert row["largest_logit_difference"] <= harness.LOGITS


@cache
def _results(family: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{family}.json").read_text())["rows"]  # type: ignore[no-any-return]


def test_no_results_of_what_is_not_supported() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == set(families.SUPPORTED)


def test_two_cases_of_each_family() -> None:
    assert set(BY_FAMILY) == set(families.SUPPORTED)
    assert all(len(cases) >= 2 for cases in BY_FAMILY.values())


@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_field_a_family_sets_has_a_mutant(family: str) -> None:
    """A field off its default must be one that some mutant flips in that case, or be exempt."""
    for case in BY_FAMILY[family]:
        flipped = {name for mutant in mutants_of(case).values() for name in mutant.fields}
        exempt = {what for who, what in EXEMPT if who in (case.id, family)} | set(flips.EXEMPT)
        spec = spec_of(case)
        unseen = generic.set_fields(spec) - flipped - exempt
        assert not [f for f in sorted(unseen) if generic.matters(f, spec)], case.id


def test_exemptions_are_of_something() -> None:
    """An exemption names a case or a family, and a field, a mutant or a row that it would have."""
    assert {who for who, _ in EXEMPT} <= set(BY_ID) | set(BY_FAMILY)
    for who, what in EXEMPT:
        cases = [case for case in CASES if who in (case.id, case.family)]
        known = {"fused", "bfloat16"}  # rows that a family does without
        for case in cases:
            spec = spec_of(case)
            known |= generic.set_fields(spec)
            known |= {m.name for m in generic.of_case(spec, case.id, case.family, MUTANTS)}
        assert what in known, (who, what)


@pytest.mark.parametrize(
    ("case", "key", "value", "named"), REFUSED_EDITS, ids=lambda value: str(value)
)
def test_a_config_of_another_model_does_not_load(
    case: str, key: str, value: Any, named: str, folder: Path, tmp_path: Path
) -> None:
    path = harness.write(BY_ID[case], tmp_path)
    whole = json.loads((path / "config.json").read_text())
    config = whole.get("text_config", whole)
    assert key in config and config[key] != value
    config[key] = value
    (path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(MoescopeError, match=named.replace(".", r"\.")):
        load_model(LoadRequest(str(path), device="cpu"))
