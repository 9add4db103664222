"""The generated tables of the pages are what the code says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
assert _spec is not None and _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    assert tables.filled(text) == text, "run: python docs/tables.py"


def test_the_example_of_a_family_is_one_short_file() -> None:
    """The page shows a family as it is in use, and says that such a file is under 60 lines."""
    text = (ROOT / "docs/adding-a-family.md").read_text()
    source = (ROOT / "moescope/engine/families/mellum.py").read_text()
    assert source in text and len(source.splitlines()) < 60


def test_files_named_in_the_readme_exist() -> None:
    import re

    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import re

    from moescope.demo import CHECKPOINT

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(block.replace("path/to/model", str(CHECKPOINT)), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0 0 Once")
    assert {line.split()[0] for line in lines} >= {"0", "1"}
