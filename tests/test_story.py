"""What the README tells is what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moescope import cli

README = Path(__file__).parents[1] / "README.md"
WIDTH = "100"  # columns of the terminal that the README's lines were copied from
ELLIPSIS = "…"
NUMBER = re.compile(r"\d+\.\d+|\d+ ?%")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", WIDTH)


def told(block: str) -> tuple[list[list[str]], list[str]]:
    """The commands of a block as arguments, and the lines below them."""
    text = README.read_text().partition(f"<!-- {block} -->\n")[2].partition(f"<!-- end {block}")[0]
    lines = [line[4:] for line in text.replace("\\\n", "").splitlines() if line[:4] == "    "]
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [arguments(command) for command in commands], lines[len(commands) :]


def arguments(command: str) -> list[str]:
    words = re.sub(
        r"\$'([^']*)'",
        lambda m: shlex.quote(m[1].encode().decode("unicode_escape")),
        command,
    )
    return shlex.split(words)[1:]


def alike(line: str, printed: str) -> bool:
    """The same words and whole numbers; other numbers within 5 % or two in the last place."""
    if NUMBER.sub("#", " ".join(line.split())) != NUMBER.sub("#", " ".join(printed.split())):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(printed), strict=True)
    return all(
        float(a.rstrip(" %")) == pytest.approx(float(b.rstrip(" %")), rel=0.05, abs=0.002)
        for a, b in pairs
    )


def compare(shown: list[str], text: str) -> None:
    """Every line that is shown is printed, in this order; only … leaves lines out."""
    printed = [line for line in text.splitlines() if line.strip()]
    at, skipping = 0, False
    for line in shown:
        if line.strip() == ELLIPSIS:
            skipping = True
            continue
        while skipping and at < len(printed) and not alike(line, printed[at]):
            at += 1
        assert at < len(printed) and alike(line, printed[at]), line
        at, skipping = at + 1, False
    assert skipping or at == len(printed), printed[at:]


def test_the_story_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,), shown = told("story")
    assert command[:2] == ["compare", "demo"] and len(shown) > 12
    assert cli.run(command) == 0
    compare(shown, capsys.readouterr().out)


def test_the_story_is_about_sums_that_differ_where_experts_do_not() -> None:
    _, shown = told("story")
    first = next(line.split() for line in shown if line.split()[:1] == ["0"])
    assert first[1:5] == ["100.0", "%", "100.0", "%"]
    assert first[-2] == "1.000" and float(first[-3]) < 0.5


def test_the_fault_is_named_as_the_readme_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record, diagnose), shown = told("diagnosis")
    assert record[:2] == ["trace", "demo"] and diagnose[0] == "diagnose" and len(shown) > 6
    monkeypatch.chdir(tmp_path)
    assert cli.run(record) == 0
    capsys.readouterr()
    assert cli.run(diagnose) == 1
    compare(shown, capsys.readouterr().out)
